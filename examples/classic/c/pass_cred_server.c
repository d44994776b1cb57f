/* pass_cred_server PATH: sends its standard output and its credentials, in one message. */
#include "classic.h"

static int send_both(int sock, int fd, const struct ucred *me) {
  unsigned char magic = MAGIC;
  struct iovec piece = {.iov_base = &magic, .iov_len = 1};
  union {
    char room[CMSG_SPACE(sizeof fd) + CMSG_SPACE(sizeof *me)];
    struct cmsghdr header;
  } control;
  struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control.room,
                           .msg_controllen = sizeof control.room};
  memset(&control, 0, sizeof control); /* CMSG_NXTHDR looks into the next header's length */

  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fd);
  memcpy(CMSG_DATA(header), &fd, sizeof fd);

  header = CMSG_NXTHDR(&message, header);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_CREDENTIALS;
  header->cmsg_len = CMSG_LEN(sizeof *me);
  memcpy(CMSG_DATA(header), me, sizeof *me);
  return sendmsg(sock, &message, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

int main(int argc, char **argv) {
  usage(argc == 2, "pass_cred_server PATH");
  int listener = serv_listen(argv[1]);
  struct ucred me = {getpid(), geteuid(), getegid()}, who;
  for (;;) {
    int conn = serv_accept(listener, &who);
    if (send_both(conn, STDOUT_FILENO, &me) == 0) {
      printf("descriptor sent, pid %d, uid %u, gid %u\n", me.pid, me.uid, me.gid);
      fflush(stdout);
    }
    close(conn);
  }
}

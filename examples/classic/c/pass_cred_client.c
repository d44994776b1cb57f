/* pass_cred_client PATH: receives a descriptor and who sent it, and copies its input to it. */
#include "classic.h"

static ssize_t recv_both(int sock, unsigned char *magic, int *fd, struct ucred *who) {
  struct iovec piece = {.iov_base = magic, .iov_len = 1};
  union {
    char room[CMSG_SPACE(sizeof *fd) + CMSG_SPACE(sizeof *who)];
    struct cmsghdr header;
  } control;
  struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control.room,
                           .msg_controllen = sizeof control.room};
  ssize_t count = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
  if (count < 0) return -1;
  for (struct cmsghdr *h = CMSG_FIRSTHDR(&message); h; h = CMSG_NXTHDR(&message, h)) {
    if (h->cmsg_level != SOL_SOCKET) continue;
    if (h->cmsg_type == SCM_CREDENTIALS && h->cmsg_len == CMSG_LEN(sizeof *who))
      memcpy(who, CMSG_DATA(h), sizeof *who);
    if (h->cmsg_type != SCM_RIGHTS) continue;
    size_t came = (h->cmsg_len - CMSG_LEN(0)) / sizeof *fd;
    for (size_t i = 0; i < came; i++) { /* the first is wanted; another must not stay open */
      int number;
      memcpy(&number, CMSG_DATA(h) + i * sizeof number, sizeof number);
      if (*fd < 0) *fd = number;
      else close(number);
    }
  }
  return count;
}

int main(int argc, char **argv) {
  usage(argc == 2, "pass_cred_client PATH");
  int sock = cli_conn(argv[1]), fd = -1, on = 1;
  struct ucred who = {0, (uid_t)-1, (gid_t)-1};
  unsigned char magic = 0;
  if (setsockopt(sock, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0) die("SO_PASSCRED");
  ssize_t count = recv_both(sock, &magic, &fd, &who);
  if (count < 0) die("recvmsg");
  if (count == 0 || magic != MAGIC || fd < 0 || who.pid == 0) {
    fprintf(stderr, "pass_cred_client: the peer is another program\n");
    return 1;
  }
  close(sock);
  printf("client: received from pid %d, uid %u, gid %u\n", who.pid, who.uid, who.gid);
  printf("client: descriptor %d received.\n", fd);
  fflush(stdout);
  char data[MAXLINE];
  while ((count = read(STDIN_FILENO, data, sizeof data)) > 0)
    if (write(fd, data, count) != count) die("write");
  return 0;
}

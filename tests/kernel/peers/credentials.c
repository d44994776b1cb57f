/* A descriptor and credentials in one message.

   credentials PATH rights-first FILE        sends SCM_RIGHTS, then SCM_CREDENTIALS
   credentials PATH credentials-first FILE   the other way round
   credentials PATH recv                     prints the sender's "pid uid gid", writes "from C" to
                                             the descriptor */
#include "peer.h"

union buffer {
  char room[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
  struct cmsghdr align;
};

static void put(struct msghdr *message, struct cmsghdr **header, int type, const void *data,
                size_t size) {
  *header = *header ? CMSG_NXTHDR(message, *header) : CMSG_FIRSTHDR(message);
  (*header)->cmsg_level = SOL_SOCKET;
  (*header)->cmsg_type = type;
  (*header)->cmsg_len = CMSG_LEN(size);
  memcpy(CMSG_DATA(*header), data, size);
}

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  int sock = connect_to(argv[1]);
  char byte = '\xab';
  union buffer control;
  memset(&control, 0, sizeof control);
  struct iovec data = {&byte, 1};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1,
                           .msg_control = control.room, .msg_controllen = sizeof control.room};
  if (strcmp(argv[2], "recv") != 0 && argc > 3) {
    int fd = open_for(argv[3]);
    struct ucred who = {getpid(), getuid(), getgid()};
    struct cmsghdr *header = NULL;
    if (strcmp(argv[2], "rights-first") == 0) {
      put(&message, &header, SCM_RIGHTS, &fd, sizeof fd);
      put(&message, &header, SCM_CREDENTIALS, &who, sizeof who);
    } else {
      put(&message, &header, SCM_CREDENTIALS, &who, sizeof who);
      put(&message, &header, SCM_RIGHTS, &fd, sizeof fd);
    }
    if (sendmsg(sock, &message, 0) != 1) DIE("sendmsg");
    return 0;
  }
  int on = 1, fd = -1;
  if (setsockopt(sock, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0) DIE("SO_PASSCRED");
  if (recvmsg(sock, &message, 0) != 1) DIE("recvmsg");
  for (struct cmsghdr *h = CMSG_FIRSTHDR(&message); h; h = CMSG_NXTHDR(&message, h)) {
    if (h->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(h), sizeof fd);
    if (h->cmsg_type == SCM_CREDENTIALS) {
      struct ucred who;
      memcpy(&who, CMSG_DATA(h), sizeof who);
      printf("%d %u %u\n", who.pid, who.uid, who.gid);
    }
  }
  if (fd < 0) { fprintf(stderr, "no descriptor\n"); return 3; }
  say(fd, "from C\n");
  return 0;
}

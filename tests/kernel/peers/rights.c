/* One descriptor with a magic byte, nothing but SCM_RIGHTS.

   rights PATH send FILE    connects and sends FILE, opened for appending
   rights PATH recv         connects, receives a descriptor, writes "from C" to it */
#include "peer.h"

#define MAGIC 0xab

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  int sock = connect_to(argv[1]);
  unsigned char byte = MAGIC;
  union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
  memset(&control, 0, sizeof control);
  struct iovec data = {&byte, 1};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1,
                           .msg_control = control.room, .msg_controllen = sizeof control.room};
  if (strcmp(argv[2], "send") == 0 && argc > 3) {
    int fd = open_for(argv[3]);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    if (sendmsg(sock, &message, 0) != 1) DIE("sendmsg");
    return 0;
  }
  byte = 0;
  if (recvmsg(sock, &message, 0) != 1) DIE("recvmsg");
  if (byte != MAGIC) { fprintf(stderr, "magic is %02x\n", byte); return 3; }
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  if (!header || header->cmsg_type != SCM_RIGHTS) { fprintf(stderr, "no descriptor\n"); return 3; }
  int fd;
  memcpy(&fd, CMSG_DATA(header), sizeof fd);
  say(fd, "from C\n");
  return 0;
}

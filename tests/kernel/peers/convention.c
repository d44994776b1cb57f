/* The NUL/status convention: words for people, NUL, status; 0 means that a descriptor rides along.

   convention PATH send FILE        connects; sends "here you are", then FILE
   convention PATH refuse STATUS    connects; sends "no, not that one" and the status
   convention PATH recv             connects; receives: writes "from C" to a descriptor, or prints
                                    "status N: words"
   convention PATH serve FILE       listens; sends FILE to the first who connects */
#include "peer.h"

static void send_status(int sock, int fd, unsigned char status) {
  char two[2] = {0, (char)status};
  union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
  struct iovec data = {two, 2};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
  memset(&control, 0, sizeof control);
  if (status == 0) {
    message.msg_control = control.room;
    message.msg_controllen = CMSG_LEN(sizeof fd);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  if (sendmsg(sock, &message, 0) != 2) DIE("sendmsg");
}

/* The descriptor, or -status. The NUL must be the last byte but one of a read. */
static int receive(int sock, char *words, size_t room) {
  size_t used = 0;
  for (;;) {
    char buffer[4096];
    union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
    struct iovec data = {buffer, sizeof buffer};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control.room,
                             .msg_controllen = CMSG_LEN(sizeof(int))};
    ssize_t count = recvmsg(sock, &message, 0);
    if (count < 0) DIE("recvmsg");
    if (count == 0) { fprintf(stderr, "connection closed\n"); exit(3); }
    for (ssize_t i = 0; i < count; i++) {
      if (buffer[i] != 0) {
        if (used + 1 < room) words[used++] = buffer[i];
        continue;
      }
      if (i != count - 2) { fprintf(stderr, "message format error\n"); exit(3); }
      unsigned char status = (unsigned char)buffer[i + 1];
      words[used] = 0;
      if (status != 0) return -status;
      if (message.msg_controllen < CMSG_LEN(sizeof(int))) {
        fprintf(stderr, "status 0, no descriptor\n");
        exit(3);
      }
      int fd;
      memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
      return fd;
    }
  }
}

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  const char *what = argv[2], *argument = argc > 3 ? argv[3] : "";
  int sock = strcmp(what, "serve") == 0 ? accept_on(argv[1]) : connect_to(argv[1]);
  if (strcmp(what, "send") == 0 || strcmp(what, "serve") == 0) {
    say(sock, "here you are");
    send_status(sock, open_for(argument), 0);
  } else if (strcmp(what, "refuse") == 0) {
    say(sock, "no, not that one");
    send_status(sock, -1, (unsigned char)atoi(argument));
  } else {
    char words[1000];
    int fd = receive(sock, words, sizeof words);
    if (fd >= 0) say(fd, "from C\n");
    else printf("status %d: %s\n", -fd, words);
  }
  return 0;
}

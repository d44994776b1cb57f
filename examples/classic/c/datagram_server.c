/* datagram_server PATH: one socket for all clients; answers each message in capitals. */
#include "classic.h"
#include <ctype.h>

int main(int argc, char **argv) {
  usage(argc == 2, "datagram_server PATH");
  struct sockaddr_un name, from;
  socklen_t size = name_of(argv[1], &name);
  int sock = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (sock < 0) die("socket");
  umask(077);
  if (bind(sock, (struct sockaddr *)&name, size) < 0) die("bind");
  remove_at_end(argv[1]);
  printf("bound to %s\n", argv[1]);
  for (;;) {
    char data[65536];
    fflush(stdout);
    memset(&from, 0, sizeof from); /* what the kernel writes need not end with NUL */
    size = sizeof from - 1;
    ssize_t count = recvfrom(sock, data, sizeof data, 0, (struct sockaddr *)&from, &size);
    if (count < 0) die("recvfrom");
    if (size <= offsetof(struct sockaddr_un, sun_path)) {
      printf("no answer: the sender has no name\n");
      continue;
    }
    const char *slash = strrchr(from.sun_path, '/');
    const char *last = slash ? slash + 1 : from.sun_path;
    printf("%zd bytes from %s: %.*s\n", count, last, (int)count, data);
    for (ssize_t i = 0; i < count; i++) data[i] = (char)toupper((unsigned char)data[i]);
    if (sendto(sock, data, count, 0, (struct sockaddr *)&from, size) < 0)
      printf("no answer to %s: %s\n", last, strerror(errno));
  }
}

/* bind_name [PATH]: binds a name in the file system to a socket, and leaves it there. */
#include "classic.h"

int main(int argc, char **argv) {
  const char *path = argc > 1 ? argv[1] : "foo.socket";
  struct sockaddr_un name;
  socklen_t size = name_of(path, &name);
  int sock = socket(AF_UNIX, SOCK_STREAM, 0);
  if (sock < 0) die("socket");
  umask(077);
  if (bind(sock, (struct sockaddr *)&name, size) < 0) die("bind");
  printf("UNIX domain socket bound to %s\n", path);
  return 0;
}

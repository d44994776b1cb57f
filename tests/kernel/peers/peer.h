/* What the three programs share: connect to the path in argv[1], die with the reason. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define DIE(what) do { perror(what); exit(1); } while (0)

static struct sockaddr_un address_of(const char *path) {
  struct sockaddr_un address;
  memset(&address, 0, sizeof address);
  address.sun_family = AF_UNIX;
  if (strlen(path) >= sizeof address.sun_path) {
    fprintf(stderr, "path too long\n");
    exit(2);
  }
  strcpy(address.sun_path, path);
  return address;
}

static inline int connect_to(const char *path) {
  struct sockaddr_un address = address_of(path);
  int sock = socket(AF_UNIX, SOCK_STREAM, 0);
  if (sock < 0) DIE("socket");
  if (connect(sock, (struct sockaddr *)&address, sizeof address) < 0) DIE("connect");
  return sock;
}

static inline int accept_on(const char *path) {
  struct sockaddr_un address = address_of(path);
  int sock = socket(AF_UNIX, SOCK_STREAM, 0), conn;
  if (sock < 0) DIE("socket");
  if (bind(sock, (struct sockaddr *)&address, sizeof address) < 0) DIE("bind");
  if (listen(sock, 5) < 0) DIE("listen");
  printf("listening\n");
  fflush(stdout);
  conn = accept(sock, NULL, NULL);
  if (conn < 0) DIE("accept");
  close(sock);
  return conn;
}

static inline int open_for(const char *path) {
  int fd = open(path, O_RDWR | O_CREAT | O_APPEND, 0600);
  if (fd < 0) DIE(path);
  return fd;
}

static inline void say(int fd, const char *text) {
  if (write(fd, text, strlen(text)) != (ssize_t)strlen(text)) DIE("write");
}

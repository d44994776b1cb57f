/* A name in the file system for a socket: bind it, listen there, accept, connect. */
#include "classic.h"

static const char *bound; /* what the handler removes */

void die(const char *what) {
  fprintf(stderr, "%s failed: %s\n", what, strerror(errno));
  exit(1);
}

void usage(int right, const char *arguments) {
  if (right) return;
  fprintf(stderr, "usage: %s\n", arguments);
  exit(2);
}

socklen_t name_of(const char *path, struct sockaddr_un *name) {
  size_t length = strlen(path);
  if (length >= sizeof name->sun_path) { /* 108 bytes on Linux, 104 on BSD and macOS */
    errno = ENAMETOOLONG;
    die(path);
  }
  memset(name, 0, sizeof *name);
  name->sun_family = AF_UNIX;
  memcpy(name->sun_path, path, length);
  socklen_t size = offsetof(struct sockaddr_un, sun_path) + length;
#ifdef __APPLE__
#define HAS_SUN_LEN
#elif defined(__FreeBSD__) || defined(__OpenBSD__) || defined(__NetBSD__)
#define HAS_SUN_LEN
#endif
#ifdef HAS_SUN_LEN
  name->sun_len = size;
#endif
  return size;
}

static void finish(int number) {
  (void)number;
  unlink(bound); /* unlink and _exit may be called in a handler */
  _exit(0);
}

void remove_at_end(const char *path) {
  bound = path;
  signal(SIGINT, finish);
  signal(SIGTERM, finish);
}

int serv_listen(const char *path) {
  struct sockaddr_un name;
  socklen_t size = name_of(path, &name);
  int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (sock < 0) die("socket");
  umask(077); /* nobody else may connect, from the first moment on */
  if (bind(sock, (struct sockaddr *)&name, size) < 0) die("bind");
  remove_at_end(path);
  if (listen(sock, 10) < 0) die("listen");
  printf("listening on %s\n", path);
  fflush(stdout);
  return sock;
}

int serv_accept(int listener, struct ucred *who) {
  socklen_t size = sizeof *who;
  int conn;
  do conn = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
  while (conn < 0 && errno == EINTR);
  if (conn < 0) die("accept");
  if (getsockopt(conn, SOL_SOCKET, SO_PEERCRED, who, &size) < 0) die("SO_PEERCRED");
  return conn;
}

int cli_conn(const char *path) {
  struct sockaddr_un name;
  socklen_t size = name_of(path, &name);
  int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (sock < 0) die("socket");
  if (connect(sock, (struct sockaddr *)&name, size) < 0) die("connect");
  return sock;
}

/* The floor: a request one way, a reply with one descriptor the other way, between two processes.
 *
 * Usage: pingpong DESCRIPTOR REQUEST-BYTES REPLY-BYTES
 * For every line "N" on its input it makes N exchanges and answers N times the median of one, in
 * nanoseconds.
 * One sendmsg(2), one recvmsg(2) and one close(2) in the client, one recv(2) and one sendmsg(2) in
 * the server. One more after each run is compared with the descriptor that was sent.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static char buffer[65536];
static union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(int))]; } control;

static void die(char const *what) { perror(what); _exit(1); }

static void serve(int sock, int descriptor, size_t reply)
{
  struct iovec data = { buffer, reply };
  struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1 };
  message.msg_control = control.room;
  message.msg_controllen = sizeof(control.room);
  struct cmsghdr *c = CMSG_FIRSTHDR(&message);
  c->cmsg_level = SOL_SOCKET;
  c->cmsg_type = SCM_RIGHTS;
  c->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(c), &descriptor, sizeof(int));
  for (;;) {
    if (recv(sock, buffer, sizeof(buffer), 0) <= 0) _exit(0);
    if (sendmsg(sock, &message, MSG_NOSIGNAL) != (ssize_t)reply) die("sendmsg");
  }
}

static int fetch(int sock, size_t request)
{
  struct iovec out = { buffer, request };
  struct msghdr asking = { .msg_iov = &out, .msg_iovlen = 1 };
  if (sendmsg(sock, &asking, MSG_NOSIGNAL) != (ssize_t)request) die("sendmsg");
  struct iovec in = { buffer, sizeof(buffer) };
  struct msghdr answer = { .msg_iov = &in, .msg_iovlen = 1,
    .msg_control = control.room, .msg_controllen = sizeof(control.room) };
  if (recvmsg(sock, &answer, MSG_CMSG_CLOEXEC) <= 0) die("recvmsg");
  struct cmsghdr *c = CMSG_FIRSTHDR(&answer);
  if (!c || c->cmsg_type != SCM_RIGHTS) die("no descriptor");
  int descriptor;
  memcpy(&descriptor, CMSG_DATA(c), sizeof(int));
  return descriptor;
}

static int order(void const *a, void const *b)
{
  long long x = *(long long const *)a, y = *(long long const *)b;
  return (x > y) - (x < y);
}

static long long now(void)
{
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
  if (argc != 4) return 100;
  int held = atoi(argv[1]);
  size_t request = (size_t)atoi(argv[2]), reply = (size_t)atoi(argv[3]);
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends)) die("socketpair");
  if (!fork()) { close(ends[0]); serve(ends[1], held, reply); }
  close(ends[1]);
  struct stat sent, came;
  if (fstat(held, &sent)) die("fstat");
  char line[64];
  while (fgets(line, sizeof(line), stdin)) {
    long count = atol(line);
    long long *took = malloc(count * sizeof(*took));
    if (!took) die("malloc");
    for (long i = 0; i < count; i++) {
      long long start = now();
      close(fetch(ends[0], request));
      took[i] = now() - start;
    }
    qsort(took, count, sizeof(*took), order);
    int descriptor = fetch(ends[0], request);
    if (fstat(descriptor, &came) || came.st_ino != sent.st_ino || came.st_dev != sent.st_dev) {
      fprintf(stderr, "another descriptor arrived\n");
      return 1;
    }
    close(descriptor);
    printf("%lld\n", took[count / 2] * count);
    fflush(stdout);
    free(took);
  }
  return 0;
}

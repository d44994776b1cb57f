/* A client of s6-fdholderd on one kept-open connection, by libs6's own calls.
 *
 * Usage: s6client SOCKET DESCRIPTOR
 * For every line "VERB N" on its input it does VERB N times and answers "NANOSECONDS COUNT",
 * N times the median of one and what was listed last:
 *   fill N      stores N identifiers a/0 .. a/N-1 that stay
 *   retrieve N  retrieves a/0 and closes what came, N times
 *   store N     stores b/0 .. b/N-1; deletes them when the clock has stopped
 *   cycle N     stores and deletes b/0, N times
 *   list N      lists all identifiers, N times
 * One more after each run of retrievals is compared with the descriptor that was stored.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <skalibs/stralloc.h>
#include <skalibs/tai.h>
#include <s6/fdholder.h>

static s6_fdholder_t holder = S6_FDHOLDER_ZERO;
static tain deadline;

static void die(char const *what) { fprintf(stderr, "%s: %s\n", what, strerror(errno)); _exit(1); }

static long long now(void)
{
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int order(void const *a, void const *b)
{
  long long x = *(long long const *)a, y = *(long long const *)b;
  return (x > y) - (x < y);
}

static void store(int fd, char const *id)
{
  tain never = TAIN_INFINITE;
  if (!s6_fdholder_store_g(&holder, fd, id, &never, &deadline)) die("store");
}

static void delete(char const *id)
{
  if (!s6_fdholder_delete_g(&holder, id, &deadline)) die("delete");
}

static void check(int fd, int held)
{
  struct stat a, b;
  if (fstat(fd, &a) || fstat(held, &b)) die("fstat");
  if (a.st_ino != b.st_ino || a.st_dev != b.st_dev) { errno = EBADF; die("another descriptor"); }
}

int main(int argc, char **argv)
{
  if (argc != 3) return 100;
  int held = atoi(argv[2]);
  tain_now_set_stopwatch_g();
  tain_add_g(&deadline, &tain_infinite_relative);
  if (!s6_fdholder_start_g(&holder, argv[1], &deadline)) die("connect");
  char line[64], verb[32], id[32];
  long count;
  while (fgets(line, sizeof(line), stdin)) {
    if (sscanf(line, "%31s %ld", verb, &count) != 2) return 100;
    unsigned int listed = 0;
    long long *took = malloc((count + 1) * sizeof(*took));
    if (!took) die("malloc");
    for (long i = 0; i < count; i++) {
      int n = 0;
      stralloc names = STRALLOC_ZERO;
      snprintf(id, sizeof(id), "%c/%ld", *verb == 'f' ? 'a' : 'b', i);
      long long start = now();
      if (!strcmp(verb, "retrieve")) {
        n = s6_fdholder_retrieve_g(&holder, "a/0", &deadline);
        if (n >= 0) close(n);
      } else if (!strcmp(verb, "fill") || !strcmp(verb, "store")) store(held, id);
      else if (!strcmp(verb, "cycle")) { store(held, "b/0"); delete("b/0"); }
      else if (!strcmp(verb, "list")) n = s6_fdholder_list_g(&holder, &names, &deadline);
      else return 100;
      took[i] = now() - start;
      if (n < 0) die(verb);
      if (*verb == 'l') listed = (unsigned int)n;
      stralloc_free(&names);
    }
    for (long i = 0; *verb == 's' && i < count; i++) {
      snprintf(id, sizeof(id), "b/%ld", i);
      delete(id);
    }
    if (*verb == 'r') {
      int fd = s6_fdholder_retrieve_g(&holder, "a/0", &deadline);
      check(fd, held);
      close(fd);
    }
    qsort(took, count, sizeof(*took), order);
    printf("%lld %u\n", took[count / 2] * count, listed);
    fflush(stdout);
    free(took);
  }
  return 0;
}

/* open_server PATH FOLDER UID: opens regular files beneath FOLDER for processes of UID. */
#include "classic.h"

/* The file, opened with our rights; or -1: *why says it and errno is the status. It follows links,
   checks the file that it found, and opens that file, not the one that has its name by then. */
static int open_beneath(const char *folder, char mode, const char *path, const char **why) {
  char link[40], real[MAXLINE] = "";
  struct stat info;
  int fd = -1, found = open(path, O_PATH | O_CLOEXEC);
  if (found < 0) {
    *why = strerror(errno);
    return -1;
  }
  snprintf(link, sizeof link, "/proc/self/fd/%d", found);
  size_t length = strlen(folder);
  if (readlink(link, real, sizeof real - 1) < 0 || strncmp(real, folder, length) != 0 ||
      real[length] != '/') {
    *why = "it is not beneath the folder";
    errno = EACCES;
  } else if (fstat(found, &info) < 0 || !S_ISREG(info.st_mode)) {
    *why = "it is not a regular file";
    errno = EINVAL;
  } else {
    int flags = mode == 'r' ? O_RDONLY : mode == 'w' ? O_WRONLY : O_WRONLY | O_APPEND;
    fd = open(link, flags | O_CLOEXEC);
    if (fd < 0) *why = strerror(errno);
  }
  int status = errno;
  close(found);
  errno = status;
  return fd;
}

static void answer(int conn, const struct ucred *who, const char *folder, uid_t uid,
                   const char *request) {
  const char *why = "the request is not: open MODE PATH";
  int fd = -1;
  errno = EINVAL;
  if (who->uid != uid) {
    why = "this server does not serve your uid";
    errno = EACCES;
  } else if (strncmp(request, "open ", 5) == 0 && request[5] && strchr("rwa", request[5]) &&
             request[6] == ' ' && request[7] == '/') {
    fd = open_beneath(folder, request[5], request + 7, &why);
  }
  printf("pid %d, uid %u: %s: %s%s\n", who->pid, who->uid, request, fd < 0 ? "refused, " : "opened",
         fd < 0 ? why : "");
  fflush(stdout);
  if (fd < 0) {
    send_err(conn, errno, why);
  } else {
    send_fd(conn, fd);
    close(fd);
  }
}

int main(int argc, char **argv) {
  usage(argc == 4, "open_server PATH FOLDER UID");
  char *folder = realpath(argv[2], NULL);
  if (!folder) die(argv[2]);
  uid_t uid = (uid_t)strtoul(argv[3], NULL, 10);
  int listener = serv_listen(argv[1]);
  /* The kernel asks the file's mode who may connect; we ask the kernel who has connected. */
  if (uid != geteuid() && chmod(argv[1], 0666) < 0) die("chmod");
  for (;;) {
    struct ucred who;
    struct timeval most = {.tv_sec = 10}; /* for a request: a silent client does not stop us */
    char request[MAXLINE];
    size_t used = 0;
    ssize_t count;
    int conn = serv_accept(listener, &who);
    setsockopt(conn, SOL_SOCKET, SO_RCVTIMEO, &most, sizeof most);
    while ((count = read(conn, request + used, sizeof request - used)) > 0) {
      used += count;
      if (memchr(request, 0, used)) { /* one request for each connection */
        answer(conn, &who, folder, uid, request);
        break;
      }
    }
    close(conn);
  }
}

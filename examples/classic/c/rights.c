/* Data with a descriptor, and the textbook's hand-over: any text, NUL, status. */
#include "classic.h"

union control { /* a buffer that is aligned as a header has to be */
  char room[CMSG_SPACE(sizeof(int))];
  struct cmsghdr header;
};

/* Sends size bytes of data, and fd with them unless it is -1. -1: errno says why not. */
int send_rights(int sock, const void *data, size_t size, int fd) {
  struct iovec piece = {.iov_base = (void *)data, .iov_len = size};
  struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
  union control control;
  memset(&control, 0, sizeof control); /* the padding goes to the kernel, too */
  if (fd >= 0) {
    message.msg_control = control.room;
    message.msg_controllen = sizeof control.room;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  return sendmsg(sock, &message, MSG_NOSIGNAL) == (ssize_t)size ? 0 : -1;
}

/* As read(2); *fd is the descriptor that came, close-on-exec, or -1. */
ssize_t recv_rights(int sock, void *data, size_t size, int *fd) {
  struct iovec piece = {.iov_base = data, .iov_len = size};
  union control control;
  struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control.room,
                           .msg_controllen = CMSG_LEN(sizeof *fd)}; /* CMSG_SPACE admits two */
  ssize_t count = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
  *fd = -1;
  if (count < 0) return -1;
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS &&
      header->cmsg_len == CMSG_LEN(sizeof *fd))
    memcpy(fd, CMSG_DATA(header), sizeof *fd);
  if (message.msg_flags & MSG_CTRUNC) { /* more came, or this process has no number free */
    if (*fd >= 0) close(*fd);
    *fd = -1;
    errno = EMSGSIZE;
    return -1;
  }
  return count;
}

int send_fd(int sock, int fd) { return send_rights(sock, "\0\0", 2, fd); }

int send_err(int sock, int status, const char *text) {
  char data[MAXLINE];
  size_t length = strnlen(text, sizeof data - 2);
  memcpy(data, text, length);
  data[length] = 0;
  data[length + 1] = (char)abs(status); /* the same byte for -13 and 13 */
  return send_rights(sock, data, length + 2, -1);
}

/* A descriptor, or the status as -1 to -255, or NO_ANSWER. The bytes before the NUL go to
   userfunc(STDERR_FILENO, bytes, how many), as they come. */
int recv_fd(int sock, userfunc_t *userfunc) {
  int fd = -1, after_nul = 0;
  for (;;) {
    char data[MAXLINE];
    int came;
    ssize_t count = recv_rights(sock, data, sizeof data, &came);
    if (came >= 0 && fd >= 0) close(came); /* one is due */
    else if (came >= 0) fd = came;
    if (count <= 0) break;
    ssize_t text = after_nul ? 0 : (ssize_t)strnlen(data, count);
    if (text > 0 && userfunc(STDERR_FILENO, data, text) != text) break;
    ssize_t status = after_nul ? 0 : text + 1;
    after_nul = after_nul || text < count;
    if (!after_nul || status == count) continue; /* the status is in the next read */
    if (status != count - 1) break;              /* something follows it */
    if (data[status] == 0 && fd >= 0) return fd;
    if (data[status] == 0) break; /* status 0 promised a descriptor */
    if (fd >= 0) close(fd);
    return -(unsigned char)data[status];
  }
  if (fd >= 0) close(fd);
  return NO_ANSWER;
}

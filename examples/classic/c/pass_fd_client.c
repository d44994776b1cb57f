/* pass_fd_client PATH: receives a descriptor, and copies its input to it. */
#include "classic.h"

int main(int argc, char **argv) {
  usage(argc == 2, "pass_fd_client PATH");
  int sock = cli_conn(argv[1]), fd;
  unsigned char magic = 0;
  ssize_t count = recv_rights(sock, &magic, 1, &fd);
  if (count < 0) die("recvmsg");
  if (count == 0 || magic != MAGIC || fd < 0) {
    fprintf(stderr, "pass_fd_client: the peer is another program\n");
    return 1;
  }
  close(sock);
  printf("client: descriptor %d received.\n", fd);
  fflush(stdout);
  char data[MAXLINE];
  while ((count = read(STDIN_FILENO, data, sizeof data)) > 0)
    if (write(fd, data, count) != count) die("write");
  return 0;
}

/* datagram_client PATH: sends each line of its input as one message, from a name of its own. */
#include "classic.h"
#include <libgen.h>

int main(int argc, char **argv) {
  usage(argc == 2, "datagram_client PATH");
  struct sockaddr_un server, mine;
  char path[sizeof mine.sun_path + 20], *line = NULL;
  size_t room = 0;
  ssize_t length;
  socklen_t size = name_of(argv[1], &server);
  char *copy = strdup(argv[1]); /* dirname changes its argument */
  if (!copy) die("strdup");
  snprintf(path, sizeof path, "%s/client.%d", dirname(copy), (int)getpid());
  int sock = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (sock < 0) die("socket");
  socklen_t mine_size = name_of(path, &mine);
  if (bind(sock, (struct sockaddr *)&mine, mine_size) < 0) die("bind");
  remove_at_end(path);
  printf("bound to client.%d\n", (int)getpid());
  fflush(stdout);
  while ((length = getline(&line, &room, stdin)) > 0) {
    char answer[65536];
    if (line[length - 1] == '\n') length--;
    if (sendto(sock, line, length, 0, (struct sockaddr *)&server, size) < 0) {
      unlink(path);
      die("sendto");
    }
    length = recv(sock, answer, sizeof answer, 0);
    if (length < 0) die("recv");
    printf("%.*s\n", (int)length, answer);
    fflush(stdout);
  }
  unlink(path);
  return 0;
}

/* What the programs share. Each is the other side of the Python program of the same name. */
#ifndef CLASSIC_H
#define CLASSIC_H
#define _GNU_SOURCE /* struct ucred, MSG_CMSG_CLOEXEC */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAXLINE 4096  /* bytes of a line, a request or one read; the textbook's constant */
#define MAGIC 0xab    /* the byte beside a descriptor: "I am the program that you mean" */
#define NO_ANSWER -256 /* of recv_fd: the connection ended, or the peer says something else */

typedef ssize_t userfunc_t(int, const void *, size_t);

void die(const char *what); /* "what failed: reason", and exit 1 */
void usage(int right, const char *arguments);

/* names.c: names and connections */
socklen_t name_of(const char *path, struct sockaddr_un *name); /* the length to give to bind */
void remove_at_end(const char *path);     /* SIGINT and SIGTERM remove the path, and exit 0 */
int serv_listen(const char *path);        /* a listening socket */
int serv_accept(int listener, struct ucred *who); /* a connection, and who made it */
int cli_conn(const char *path);           /* a connection to the server at path */

/* rights.c: descriptors */
int send_rights(int sock, const void *data, size_t size, int fd);
ssize_t recv_rights(int sock, void *data, size_t size, int *fd);
int send_fd(int sock, int fd);
int send_err(int sock, int status, const char *text); /* status -1 to -255, or 1 to 255 */
int recv_fd(int sock, userfunc_t *userfunc);          /* a descriptor, a status -1 to -255 */
#endif

/* Bare sockets on the loopback, for tests that stand in the library's way or in a peer's place. After harness.h. */
#ifndef TPRPC_TESTS_SOCKETS_H
#define TPRPC_TESTS_SOCKETS_H

#include <arpa/inet.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

/* A socket bound to that port, 0 for one that nobody uses; sets which it is. */
static inline int socket_bound(uint16_t *port) {
    struct sockaddr_in at;
    socklen_t size = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    at.sin_port = htons(*port);
    REQUIRE(fd >= 0 && bind(fd, (struct sockaddr *)(void *)&at, sizeof at) == 0);
    REQUIRE(getsockname(fd, (struct sockaddr *)(void *)&at, &size) == 0);
    *port = ntohs(at.sin_port);
    return fd;
}

/* A port that nobody uses. */
static inline uint16_t socket_free_port(void) {
    uint16_t port = 0;
    close(socket_bound(&port));
    return port;
}

static inline int socket_listen(uint16_t *port) {
    *port = 0;
    int fd = socket_bound(port);
    REQUIRE(listen(fd, 16) == 0);
    return fd;
}

/* The same, and the address as connect takes it. */
static inline int socket_listen_at(char *address, size_t size) {
    uint16_t port;
    int fd = socket_listen(&port);
    snprintf(address, size, "tcp://127.0.0.1:%d", port);
    return fd;
}

static inline int socket_connect(uint16_t port) {
    struct sockaddr_in to;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&to, 0, sizeof to);
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons(port);
    REQUIRE(fd >= 0 && connect(fd, (struct sockaddr *)(void *)&to, sizeof to) == 0);
    return fd;
}

/* Whether the other end's kernel has all that was sent. */
static inline bool socket_arrived(int fd) {
    int left = 0;
    return ioctl(fd, SIOCOUTQ, &left) != 0 || left == 0;
}

/* To the port that ends an address. */
static inline int socket_connect_to(const char *address) {
    return socket_connect((uint16_t)atoi(strrchr(address, ':') + 1));
}

#endif

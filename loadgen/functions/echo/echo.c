/*
 * The smallest sample function: one thread, epoll, HTTP/1.1, one request per connection.
 *
 * In: GET /?row=N. Out: JSON with entry N of a table that was filled at start-up from a random token; loadgen/checks.py
 * computes what the entry must be from the row and the token.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#define ENTRIES 65536
#define CONNECTIONS 1024
#define REQUEST_BYTES 2048

static uint64_t seed, count, table[ENTRIES];

/* What has been read of each connection's request, by file descriptor. */
static struct {
    size_t length;
    char text[REQUEST_BYTES + 1];
} requests[CONNECTIONS];

/* splitmix64's output function. */
static uint64_t mix(uint64_t z)
{
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static void answer(int fd, const char *request)
{
    char body[256], head[192];
    unsigned long long row = 0;
    int status = 404, body_length, head_length;

    if (!strncmp(request, "GET / ", 6)
        || (!strncmp(request, "GET /?row=", 10) && isdigit((unsigned char)request[10])
            && sscanf(request + 10, "%llu ", &row) == 1))
        status = 200;
    if (status == 200)
        body_length = snprintf(body, sizeof(body),
                               "{\"function\": \"echo\", \"token\": \"%016llx\", \"row\": %llu, \"value\": \"%016llx\", \"count\": %llu}",
                               (unsigned long long)seed, row, (unsigned long long)mix(table[row % ENTRIES] ^ row),
                               (unsigned long long)++count);
    else
        body_length = snprintf(body, sizeof(body), "{\"error\": \"GET /?row=N, N = 0, 1, 2, …\"}");
    head_length = snprintf(head, sizeof(head),
                           "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n",
                           status == 200 ? "200 OK" : "404 Not Found", body_length);
    /* Both parts fit a fresh socket's buffer, so a short write only means that the client is gone. */
    if (send(fd, head, head_length, MSG_NOSIGNAL | MSG_MORE) == head_length)
        (void)!send(fd, body, body_length, MSG_NOSIGNAL);
}

static void serve(int fd)
{
    ssize_t got = recv(fd, requests[fd].text + requests[fd].length, REQUEST_BYTES - requests[fd].length, MSG_DONTWAIT);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got > 0) {
        requests[fd].length += got;
        requests[fd].text[requests[fd].length] = 0;
        if (!strstr(requests[fd].text, "\r\n\r\n")) {
            if (requests[fd].length < REQUEST_BYTES)
                return;
        } else {
            answer(fd, requests[fd].text);
        }
    }
    close(fd); /* also leaves the epoll set */
}

int main(int argc, char **argv)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    struct epoll_event event = {.events = EPOLLIN}, events[64];
    int one = 1, listener, poller;

    if (argc != 2 || getrandom(&seed, sizeof(seed), 0) != sizeof(seed)) {
        fprintf(stderr, "usage: echo PORT\n");
        return 2;
    }
    for (uint64_t i = 0; i < ENTRIES; i++)
        table[i] = mix(seed ^ i);
    signal(SIGPIPE, SIG_IGN);
    address.sin_port = htons(atoi(argv[1]));
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    poller = epoll_create1(EPOLL_CLOEXEC);
    event.data.fd = listener;
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 128)
        || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event)) {
        perror("echo: cannot listen");
        return 1;
    }
    puts("echo is ready");
    fflush(stdout);
    for (;;) {
        int ready = epoll_wait(poller, events, 64, -1);

        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;

            if (fd != listener) {
                serve(fd);
                continue;
            }
            fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd < 0)
                continue;
            event.data.fd = fd;
            if (fd >= CONNECTIONS || epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) {
                close(fd);
                continue;
            }
            requests[fd].length = 0;
        }
    }
}

// What the C programs of this folder share: messages with descriptors over a SOCK_SEQPACKET socket, and starting a tool by descriptor.
// Included once by each (infra.local.native compiles one file with what it includes).
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MESSAGE_MAX = 128 * 1024, FDS_MAX = 32, TOOL_FD = 100 };

// Send a line, with a descriptor unless `passed` is negative. A peer that is gone or does not read loses it.
static inline void send_to(int to, int passed, const char *format, va_list arguments) {
    char text[512], space[CMSG_SPACE(sizeof(int))];
    int length = vsnprintf(text, sizeof text, format, arguments);
    if (length >= (int)sizeof text) length = sizeof text - 1;
    struct iovec part = {text, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (passed >= 0) {
        message.msg_control = space;
        message.msg_controllen = sizeof space;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &passed, sizeof passed);
    }
    while (sendmsg(to, &message, MSG_NOSIGNAL) < 0 && errno == EINTR) {}
}

// Receive one message of up to MESSAGE_MAX - 1 bytes; what came with it is close-on-exec.
static inline int receive_from(int from, char *buffer, int *fds, int *count) {
    char space[CMSG_SPACE(FDS_MAX * sizeof(int))];
    struct iovec part = {buffer, MESSAGE_MAX - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    int length;
    while ((length = recvmsg(from, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR) {}
    *count = 0;
    if (length <= 0) return length;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header))
        if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
            *count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(header), *count * sizeof(int));
        }
    buffer[length] = 0;
    return length;
}

static inline void die(const char *what) {
    dprintf(2, "thaw-init: %s: %s\n", what, strerror(errno));
    _exit(127);
}

// dup2 that also takes away close-on-exec when both numbers are the same.
static inline void place(int fd, int number) {
    if (fd == number ? fcntl(fd, F_SETFD, 0) < 0 : dup2(fd, number) < 0) die("dup2");
}

// Become the tool fds[0] with the others as 100, 101, …, and with `worker_socket`, if there is one, as 3.
static inline void run_tool(char **arguments, const int *fds, int fd_count, int worker_socket) {
    // 130 (FI_NO_BREAKPOINTS): CRIU then stops restored processes by tracing their last system calls. A hardware breakpoint is a perf event,
    // and the first one of a second makes the kernel wait for an RCU grace period: 10-20 ms of each restore.
    char *environment[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "CRIU_FAULT=130", NULL};
    if (fd_count < 1) die("bad order");
    int executable = fcntl(fds[0], F_DUPFD_CLOEXEC, TOOL_FD + FDS_MAX);  // out of the way of what is placed below
    for (int i = 1; i < fd_count; i++) place(fds[i], TOOL_FD + i - 1);
    if (worker_socket >= 0) place(worker_socket, 3);
    syscall(SYS_execveat, executable, "", arguments, environment, 0x1000 /* AT_EMPTY_PATH */);
    die("exec of the tool");
}

// Send a signal to a process of this namespace if it has a handler for it: without one the signal would end it.
static inline void signal_handler(const char *pid, int number) {
    char path[64], line[256];
    unsigned long long caught = 0;
    snprintf(path, sizeof path, "/proc/%d/status", atoi(pid));
    FILE *file = fopen(path, "re");
    if (!file) return;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "SigCgt: %llx", &caught) == 1) break;
    fclose(file);
    if (number > 0 && number < 65 && caught >> (number - 1) & 1) kill(atoi(pid), number);
}

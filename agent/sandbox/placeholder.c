// PID 1 of a placeholder pod: waits, unprivileged, until an agent restores an instance beside it or asks it to start the command.
//
// usage: placeholder COMMAND [ARGUMENT...]
//        placeholder --install PATH    copy this program there, for the container that shall run it
//
// The agent takes one end of our socket pair, descriptor AGENT_FD, out of this process (pidfd_getfd(2)). No path leads to it, so nothing
// in the pod can pretend to be the agent or us; and an agent that dies leaves us as we are, for the next one to do the same.
// Orders: one letter, then NUL-terminated arguments.
//   R                 a new agent is there: R, then the latest E again
//   A                 start the command as its own session                                   -> P pid
//   S signal          send a signal to every process but PID 1                               (no answer)
//   H pid signal      send a signal to one process if it has a handler for it                (no answer)
//   G pid             an instance is complete: when this process of it ends, end with its code, as the container of a plain pod does
//   F                 the pod is empty and will be used again: forget all ends                -> k
// Unasked: E pid status for each process reaped. Signals to us go to every process; after SIGTERM, SIGINT or SIGQUIT we end as soon as
// all that we could signal has ended or is stopped (a standby never gets to handle it).
// Works with a read-only root, all capabilities dropped and any user. Built statically by infra.local.native.
#define _GNU_SOURCE
#include "messages.h"
#include <poll.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { AGENT_FD = 3, ENDED_MAX = 64, ARGS_MAX = 8 };

static int control;  // our end
static char **command;
static struct { pid_t pid; int status; } ended[ENDED_MAX];  // the latest ends, for an agent that was not there
static unsigned ended_count;
static pid_t instance;  // ends the container with it
static int code;        // what it ended with

static void answer(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    send_to(control, -1, format, arguments);
    va_end(arguments);
}

static int install(const char *path) {
    struct stat status;
    int source = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    unlink(path);
    int target = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0755);
    if (source < 0 || target < 0 || fstat(source, &status)) die(path);
    for (off_t at = 0; at < status.st_size;)
        if (sendfile(target, source, &at, status.st_size - at) <= 0) die(path);
    if (fchmod(target, 0555) || close(target)) die(path);
    return 0;
}

static void start(void) {
    pid_t child = fork();
    if (child == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        setsid();  // CRIU dumps whole sessions
        execvp(command[0], command);
        die(command[0]);
    }
    if (child < 0) answer("e fork: %s", strerror(errno));
    else answer("P %d", child);
}

static void report(unsigned number) {
    answer("E %d %d", ended[number % ENDED_MAX].pid, ended[number % ENDED_MAX].status);
}

static void welcome(void) {
    answer("R");
    for (unsigned i = ended_count > ENDED_MAX ? ended_count - ENDED_MAX : 0; i < ended_count; i++) report(i);
}

// Whether the process `pid` was complete when it ended; then so is the container.
static int reap(void) {
    int status, complete = 0;
    pid_t child;
    while ((child = waitpid(-1, &status, WNOHANG)) > 0) {
        ended[ended_count % ENDED_MAX].pid = child;
        ended[ended_count % ENDED_MAX].status = status;
        report(ended_count++);
        if (child == instance) {
            code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            complete = 1;
        }
    }
    return complete;
}

static void handle(char *buffer, int length) {
    char *arguments[ARGS_MAX] = {0};
    int count = 0;
    for (char *at = buffer + 1; at < buffer + length && count < ARGS_MAX; at += strlen(at) + 1) arguments[count++] = at;
    switch (buffer[0]) {
    case 'R': welcome(); break;
    case 'A': start(); break;
    case 'S': if (count == 1) kill(-1, atoi(arguments[0])); break;
    case 'H': if (count == 2) signal_handler(arguments[0], atoi(arguments[1])); break;
    case 'G': if (count == 1) instance = atoi(arguments[0]); break;
    case 'F': ended_count = 0; instance = 0; answer("k"); break;
    default: answer("e unknown order");
    }
}

static char state_of(int pid) {
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    int length = read(fd, text, sizeof text - 1);
    close(fd);
    text[length > 0 ? length : 0] = 0;
    char *after_name = strrchr(text, ')');
    return after_name && after_name[1] ? after_name[2] : 0;
}

// Whether a child runs that a signal of ours reaches: a waiting tool of the agent is none of our business.
static int anything_runs(void) {
    FILE *children = fopen("/proc/self/task/1/children", "re");
    int pid, runs = 0;
    if (!children) return 0;
    while (!runs && fscanf(children, "%d", &pid) == 1) {
        char state = state_of(pid);
        runs = state && !strchr("TtZX", state) && kill(pid, 0) == 0;
    }
    fclose(children);
    return runs;
}

int main(int count, char **arguments) {
    static char buffer[MESSAGE_MAX];
    int pair[2], fds[FDS_MAX], fd_count, terminating = 0;
    if (count == 3 && !strcmp(arguments[1], "--install")) return install(arguments[2]);
    if (count < 2) { dprintf(2, "usage: init COMMAND [ARGUMENT...]\n"); return 2; }
    if (getpid() != 1) { dprintf(2, "thaw-init: not PID 1: signals meant for a container would go to everybody\n"); return 2; }
    command = arguments + 1;
    prctl(PR_SET_NAME, "thaw-init");
    prctl(PR_SET_DUMPABLE, 0);  // what runs as the same user may not look into us
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair)) die("socketpair");
    control = fcntl(pair[0], F_DUPFD_CLOEXEC, AGENT_FD + 1);
    int agent = fcntl(pair[1], F_DUPFD_CLOEXEC, AGENT_FD + 1);
    close(pair[0]);
    close(pair[1]);
    if (dup3(agent, AGENT_FD, O_CLOEXEC) < 0) die("dup3");
    close(agent);
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    int signals = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
    for (;;) {
        struct pollfd wait[2] = {{signals, POLLIN, 0}, {control, POLLIN, 0}};
        poll(wait, 2, terminating ? 100 : -1);
        struct signalfd_siginfo info;
        while (read(signals, &info, sizeof info) > 0) {
            if (info.ssi_signo == SIGCHLD || info.ssi_signo == SIGPIPE) continue;
            if (info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT || info.ssi_signo == SIGQUIT) terminating = 1;
            kill(-1, info.ssi_signo);
        }
        int complete = reap();
        int length = receive_from(control, buffer, fds, &fd_count);
        if (length > 0) handle(buffer, length);
        for (int i = 0; i < fd_count; i++) close(fds[i]);
        if (complete || (terminating && !anything_runs())) return code;
    }
}

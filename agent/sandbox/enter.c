// Starts a tool of the agent inside a placeholder pod: joins its cgroups, then its namespaces, then becomes the tool, by descriptor.
//
// usage: enter MODE INIT_PIDFD CONTROL_FD CGROUP_FDS TOOL_FDS ARGUMENT...
//   MODE         T tool · W the same with its end of a new socket pair on descriptor 3 · L LAST_PID: the pod's next pid is the one after it
//   INIT_PIDFD   pidfd of the pod's PID 1
//   CONTROL_FD   gets "P pid", or "S pid" with the other end of the socket pair; the pid is that inside
//   CGROUP_FDS   cgroup.procs files to join, comma-separated; empty: none
//   TOOL_FDS     the executable, then what becomes descriptors 100, 101, …
// The tool is nobody's child but the pod's PID 1's, who reaps it: it needs nothing of us or of the agent. Privileged: it has the agent's
// user, capabilities and no seccomp filter until it restores a process, which gets those that its image says.
// Built statically by infra.local.native.
#define _GNU_SOURCE
#include "messages.h"
#include <sched.h>
#include <sys/wait.h>

static int parse(char *text, int *numbers) {
    int count = 0;
    for (char *word = strtok(text, ","); word && count < FDS_MAX; word = strtok(NULL, ",")) numbers[count++] = atoi(word);
    return count;
}

static void tell(int to, int passed, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    send_to(to, passed, format, arguments);
    va_end(arguments);
}

static void become(char mode, int control, int null, char **arguments, const int *fds, int fd_count) {
    int pair[2] = {-1, -1};
    if (mode == 'W') {
        // Made here: CRIU looks up its peer's pid, and it must find itself.
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) die("socketpair");
        tell(control, pair[0], "S %d", getpid());
    } else {
        tell(control, -1, "P %d", getpid());
    }
    setsid();
    for (int fd = 0; fd < 3; fd++) place(null, fd);  // the caller reads our output to its end
    run_tool(arguments, fds, fd_count, pair[1]);
}

int main(int count, char **arguments) {
    int groups[FDS_MAX], fds[FDS_MAX];
    if (count < 7) { dprintf(2, "usage: enter MODE INIT_PIDFD CONTROL_FD CGROUP_FDS TOOL_FDS ARGUMENT...\n"); return 2; }
    char mode = arguments[1][0];
    int init = atoi(arguments[2]), control = atoi(arguments[3]);
    int group_count = parse(arguments[4], groups), fd_count = parse(arguments[5], fds);
    for (int i = 0; i < group_count; i++) {
        if (write(groups[i], "0", 1) < 0) die("cgroup");
        close(groups[i]);
    }
    // Out of the way of the numbers that they shall have.
    for (int i = 0; i < fd_count; i++)
        if ((fds[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, TOOL_FD + 2 * FDS_MAX)) < 0) die("fcntl");
    if ((control = fcntl(control, F_DUPFD_CLOEXEC, TOOL_FD + 2 * FDS_MAX)) < 0) die("fcntl");
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0) die("/dev/null");
    // Opened where it can be written; what counts is the pid namespace of who writes.
    int last_pid = mode == 'L' ? open("/proc/sys/kernel/ns_last_pid", O_WRONLY | O_CLOEXEC) : -1;
    if (mode == 'L' && last_pid < 0) die("ns_last_pid");
    if (setns(init, CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP)) die("setns");
    close(init);
    if (chdir("/")) die("chdir");
    pid_t child = fork();
    if (child == 0) {
        if (mode == 'L') _exit(write(last_pid, arguments[6], strlen(arguments[6])) < 0);
        // Once more, so that the tool's parent is of the pod's pid namespace, and PID 1 there inherits it.
        pid_t tool = fork();
        if (tool == 0) become(mode, control, null, arguments + 6, fds, fd_count);
        _exit(tool < 0);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) < 0) die("fork");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

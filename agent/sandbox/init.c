// PID 1 of a sandbox: makes the namespaces, waits for orders on a socket, starts programs, reaps, reports.
//
// usage: init LISTENER_FD MOUNT_POINT ORPHAN_S
//   LISTENER_FD  SOCK_SEQPACKET listener; whoever connects is the agent, and a new connection replaces the old one. Instances outlive an
//                agent that dies: the next one connects and goes on.
//   MOUNT_POINT  any empty directory; the sandbox's tmpfs is mounted there, in the sandbox's own mount namespace.
//   ORPHAN_S     seconds without an agent after which PID 1 exits, and the kernel ends everything in the sandbox: nothing is left for good.
// The host pid of PID 1 is printed on standard output. It is a child of the caller (CLONE_PARENT), who reaps it.
//
// Orders: one letter, then NUL-terminated arguments, with descriptors attached. Answers go to the agent in the order of the orders.
//   M lower                      mount the root (overlay of `lower` and our tmpfs), pivot into it   -> k | e message
//   B hostname target... [mounts]   set the name; attach detached mounts at paths of the root       -> k | e message
//   N address netmask gateway hardware   configure eth0 and lo; where the gateway is, without ARP   -> k | e message
//   A uid gid nofile fsize dir nenv env... argv...  [stdout+stderr]   start the application          -> P pid
//   X argv...  [exe, fds -> 100, 101, ...]    start a tool by descriptor (CRIU)                      -> P pid
//   W argv...  [exe, fds -> 100, 101, ...]    the same, its end of a new socket pair on fd 3         -> S pid + fd
//   S signal                     send a signal to every process but PID 1                           (no answer)
//   H pid signal                 send a signal to one process if it has a handler for it            (no answer)
// Unasked: R + descriptor of the writable layer to each new agent, then the latest E; E pid status for each process reaped.
//
// It trusts the agent; it trusts nothing that runs inside. Built statically by infra.local.native.
#define _GNU_SOURCE
#include "messages.h"
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/ether.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <poll.h>
#include <sched.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { ARGS_MAX = 1024, FIRST_PID = 1000, ENDED_MAX = 64 };

extern char **environ;
static int control = -1;  // the agent; -1 while there is none
static struct { pid_t pid; int status; } ended[ENDED_MAX];  // the latest ends, for an agent that was not there
static unsigned ended_count;
static char mount_point[4096];

static void send_message(int fd, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (control >= 0) send_to(control, fd, format, arguments);
    va_end(arguments);
}

#define TRY(call) do { if ((call) < 0) { snprintf(why, sizeof why, "%s: %s", #call, strerror(errno)); return why; } } while (0)
static char why[400];

static void join(char *out, size_t size, const char *a, const char *b) {
    if (snprintf(out, size, "%s%s", a, b) >= (int)size) _exit(111);
}

// The writable layer: one tmpfs with the overlay's upper and work directories and what becomes /tmp, /dev/shm and /run.
static const char *make_layer(void) {
    static const struct { const char *name; mode_t mode; } directories[] = {
        {"/upper", 0755}, {"/work", 0755}, {"/root", 0755}, {"/tmp", 01777}, {"/shm", 01777}, {"/run", 0755}};
    char path[4200];
    TRY(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    TRY(mount("tmpfs", mount_point, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"));
    for (size_t i = 0; i < sizeof directories / sizeof *directories; i++) {
        join(path, sizeof path, mount_point, directories[i].name);
        TRY(mkdir(path, 0700));
        TRY(chmod(path, directories[i].mode));
    }
    return NULL;
}

static const char *bind_mount(const char *root, const char *source, const char *target, int is_file) {
    char path[4400];
    join(path, sizeof path, root, target);
    if (is_file) {
        int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0666);
        if (fd >= 0) close(fd);
    } else {
        mkdir(path, 0755);
    }
    TRY(mount(source, path, NULL, MS_BIND, NULL));
    return NULL;
}

// Attach a detached mount (a read-only file or directory of the node) at a path of the root; makes it and its parents in the writable layer.
static const char *attach_mount(int mount_fd, char *target) {
    struct stat status;
    TRY(fstat(mount_fd, &status));
    for (char *slash = target + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        mkdir(target, 0755);
        *slash = '/';
    }
    if (S_ISDIR(status.st_mode)) {
        mkdir(target, 0755);
    } else {
        int fd = open(target, O_CREAT | O_WRONLY | O_CLOEXEC, 0666);
        if (fd >= 0) close(fd);
    }
    TRY(syscall(SYS_move_mount, mount_fd, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH));
    return NULL;
}

static const char *bind_files(char **arguments, int count, const int *fds, int fd_count) {
    if (count != fd_count + 1) return "bad order";
    TRY(sethostname(arguments[0], strlen(arguments[0])));
    for (int i = 0; i < fd_count; i++) {
        const char *failed = attach_mount(fds[i], arguments[i + 1]);
        if (failed) return failed;
    }
    return NULL;
}

static const char *mount_root(const char *lower) {
    static const char *const nodes[] = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"};
    char root[4200], path[4400], options[16384], source[4200];
    const char *failed;
    join(root, sizeof root, mount_point, "/root");
    if (snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, mount_point, mount_point)
        >= (int)sizeof options) return "the list of lower directories is too long";
    TRY(mount("overlay", root, "overlay", MS_NOSUID | MS_NODEV, options));
    static const char *const directories[] = {"/proc", "/dev", "/tmp", "/run"};
    for (size_t i = 0; i < sizeof directories / sizeof *directories; i++) {
        join(path, sizeof path, root, directories[i]);
        mkdir(path, 0755);
    }
    join(path, sizeof path, root, "/proc");
    TRY(mount("proc", path, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
    join(path, sizeof path, root, "/dev");
    TRY(mount("tmpfs", path, "tmpfs", MS_NOSUID, "mode=755,size=64k"));
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++)
        if ((failed = bind_mount(root, nodes[i], nodes[i], 1))) return failed;
    join(path, sizeof path, root, "/dev/fd");
    TRY(symlink("/proc/self/fd", path));
    static const struct { const char *from, *to; } parts[] = {{"/tmp", "/tmp"}, {"/shm", "/dev/shm"}, {"/run", "/run"}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        join(source, sizeof source, mount_point, parts[i].from);
        if ((failed = bind_mount(root, source, parts[i].to, 0))) return failed;
    }
    TRY(chdir(root));
    TRY(syscall(SYS_pivot_root, ".", "."));
    TRY(umount2(".", MNT_DETACH));
    TRY(chdir("/"));
    return NULL;
}

static const char *configure_link(int fd, const char *name, const char *address, const char *netmask) {
    struct ifreq request = {0};
    struct sockaddr_in *slot = (struct sockaddr_in *)&request.ifr_addr;
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (address) {
        slot->sin_family = AF_INET;
        if (inet_pton(AF_INET, address, &slot->sin_addr) != 1) return "not an address";
        TRY(ioctl(fd, SIOCSIFADDR, &request));
        if (inet_pton(AF_INET, netmask, &slot->sin_addr) != 1) return "not a netmask";
        TRY(ioctl(fd, SIOCSIFNETMASK, &request));
    }
    TRY(ioctl(fd, SIOCGIFFLAGS, &request));
    request.ifr_flags |= IFF_UP;
    TRY(ioctl(fd, SIOCSIFFLAGS, &request));
    return NULL;
}

// Tell the kernel for good which hardware address the gateway has, so that it need not ask: see arp(7).
static const char *set_neighbour(int fd, const char *name, const char *address, const char *hardware) {
    struct arpreq request = {.arp_flags = ATF_PERM | ATF_COM, .arp_ha.sa_family = ARPHRD_ETHER};
    struct sockaddr_in *slot = (struct sockaddr_in *)&request.arp_pa;
    slot->sin_family = AF_INET;
    if (inet_pton(AF_INET, address, &slot->sin_addr) != 1) return "the gateway is not an address";
    if (!ether_aton_r(hardware, (struct ether_addr *)request.arp_ha.sa_data)) return "the gateway has no hardware address";
    strncpy(request.arp_dev, name, sizeof request.arp_dev - 1);
    TRY(ioctl(fd, SIOCSARP, &request));
    return NULL;
}

static const char *configure_network(char **arguments) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return "no socket";
    const char *failed = configure_link(fd, "lo", NULL, NULL);
    if (!failed) failed = configure_link(fd, "eth0", arguments[0], arguments[1]);
    if (!failed) failed = set_neighbour(fd, "eth0", arguments[2], arguments[3]);
    close(fd);
    return failed;
}

// Give up every privilege for good: no capability in any set, none to be gained by exec.
static void drop_privileges(uid_t uid, gid_t gid) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{0}};
    for (int cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0)) die("drop of the bounding set");
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)) die("ambient capabilities");
    if (setgroups(0, NULL) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid)) die("change of user");
    if (syscall(SYS_capset, &header, data)) die("capset");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) die("no_new_privs");
}

// Refuse system calls that an unprivileged process may make and a function need not: user namespaces give it capabilities over new parts
// of the kernel, keys are shared by all processes of a user on this node, and what io_uring opens cannot be frozen.
static void filter_system_calls(void) {
    enum { NR = offsetof(struct seccomp_data, nr), ARCH = offsetof(struct seccomp_data, arch), FLAGS = offsetof(struct seccomp_data, args[0]) };
    enum { NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP | 0x80 };
    static const int refused[] = {
        SYS_mount, SYS_umount2, SYS_pivot_root, SYS_setns, SYS_open_tree, SYS_move_mount, SYS_fsopen, SYS_fsconfig, SYS_fsmount, SYS_fspick,
        442 /* mount_setattr */, 467 /* open_tree_attr */, SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_keyctl, SYS_add_key,
        SYS_request_key, SYS_syslog, SYS_kexec_load, SYS_kexec_file_load, SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_acct,
        SYS_swapon, SYS_swapoff, SYS_reboot, SYS_quotactl, 443 /* quotactl_fd */, SYS_open_by_handle_at, SYS_iopl, SYS_ioperm};
    static const int missing[] = {SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register, SYS_clone3 /* libc then takes clone */};
    enum { REFUSED = sizeof refused / sizeof *refused, MISSING = sizeof missing / sizeof *missing };
    struct sock_filter program[16 + 2 * (REFUSED + MISSING)], *next = program;
    const struct sock_filter refuse = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
    const struct sock_filter none = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
    *next++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, ARCH);
    *next++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    *next++ = none;  // 32 bits: other numbers
    *next++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, NR);
    *next++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1);
    *next++ = none;  // x32
    for (int i = 0; i < REFUSED; i++) {
        *next++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, refused[i], 0, 1);
        *next++ = refuse;
    }
    for (int i = 0; i < MISSING; i++) {
        *next++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, missing[i], 0, 1);
        *next++ = none;
    }
    *next++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_unshare, 1, 0);
    *next++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 3);
    *next++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, FLAGS);
    *next++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, NAMESPACES, 0, 1);
    *next++ = refuse;
    *next++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog whole = {next - program, program};
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &whole)) die("seccomp");
}

// CRIU restores processes under the pids they had: keep low ones free for PID 1, CRIU and its helpers.
static void reserve_low_pids(void) {
    char text[16];
    int fd = open("/proc/sys/kernel/ns_last_pid", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    int length = snprintf(text, sizeof text, "%d", FIRST_PID - 1);
    if (write(fd, text, length) < 0) {}
    close(fd);
}

static void run_application(char **arguments, int count, const int *fds, int fd_count) {
    if (count < 7 || fd_count < 1) die("bad order");
    uid_t uid = strtoul(arguments[0], NULL, 10);
    gid_t gid = strtoul(arguments[1], NULL, 10);
    rlim_t files = strtoul(arguments[2], NULL, 10);
    rlim_t size = strtoul(arguments[3], NULL, 10);
    int variables = atoi(arguments[5]);
    if (variables < 0 || count < 7 + variables) die("bad order");
    int null = open("/dev/null", O_RDWR);
    if (null < 0) die("/dev/null");
    place(null, 0);
    place(fds[0], 1);
    place(fds[0], 2);
    if (null > 2) close(null);
    setsid();
    struct rlimit limit = {files, files}, length = {size, size}, none = {0, 0};
    setrlimit(RLIMIT_NOFILE, &limit);
    // Its output is a file of the node. A write beyond is an error, not the end.
    setrlimit(RLIMIT_FSIZE, &length);
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_CORE, &none);
    if (chdir(arguments[4])) die(arguments[4]);
    clearenv();
    for (int i = 0; i < variables; i++) putenv(arguments[6 + i]);
    drop_privileges(uid, gid);
    filter_system_calls();
    char **command = arguments + 6 + variables;
    execvp(command[0], command);
    die(command[0]);
}

static void start(char order, char **arguments, int count, const int *fds, int fd_count, const sigset_t *blocked) {
    if (order == 'A') reserve_low_pids();
    pid_t child = fork();
    if (child == 0) {
        int pair[2] = {-1, -1};
        sigprocmask(SIG_UNBLOCK, blocked, NULL);
        if (order == 'A') run_application(arguments, count, fds, fd_count);
        if (order == 'W') {
            // Made in the child: CRIU looks up its peer's pid, and it must find itself.
            if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) die("socketpair");
            send_message(pair[0], "S %d", getpid());
        }
        run_tool(arguments, fds, fd_count, pair[1]);
    }
    if (child < 0) send_message(-1, "e fork: %s", strerror(errno));
    else if (order != 'W') send_message(-1, "P %d", child);  // a worker's child answers for itself
}

static void handle(char *buffer, int length, int *fds, int fd_count, const sigset_t *blocked) {
    char *arguments[ARGS_MAX + 1];
    int count = 0;
    for (char *at = buffer + 1; at < buffer + length && count < ARGS_MAX; at += strlen(at) + 1) arguments[count++] = at;
    arguments[count] = NULL;
    const char *failed = NULL;
    switch (buffer[0]) {
    case 'M': failed = count == 1 ? mount_root(arguments[0]) : "bad order"; break;
    case 'B': failed = bind_files(arguments, count, fds, fd_count); break;
    case 'S': if (count == 1) kill(-1, atoi(arguments[0])); break;
    case 'H': if (count == 2) signal_handler(arguments[0], atoi(arguments[1])); break;
    case 'N': failed = count == 4 ? configure_network(arguments) : "bad order"; break;
    case 'A': case 'X': case 'W': start(buffer[0], arguments, count, fds, fd_count, blocked); break;
    default: failed = "unknown order";
    }
    for (int i = 0; i < fd_count; i++) close(fds[i]);
    if (strchr("MBN", buffer[0]) || failed) failed ? send_message(-1, "e %s", failed) : send_message(-1, "k");
}

static void reap(void) {
    int status;
    pid_t child;
    while ((child = waitpid(-1, &status, WNOHANG)) > 0) {
        ended[ended_count % ENDED_MAX].pid = child;
        ended[ended_count++ % ENDED_MAX].status = status;
        send_message(-1, "E %d %d", child, status);
    }
}

static void welcome(int listener, int layer) {
    int agent = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (agent < 0) return;
    if (control >= 0) close(control);
    control = agent;
    send_message(layer, "R");
    for (unsigned i = ended_count > ENDED_MAX ? ended_count - ENDED_MAX : 0; i < ended_count; i++)
        send_message(-1, "E %d %d", ended[i % ENDED_MAX].pid, ended[i % ENDED_MAX].status);
}

static int serve(int listener, int orphan_s) {
    static char buffer[MESSAGE_MAX];
    int fds[FDS_MAX], fd_count;
    sigset_t blocked;
    prctl(PR_SET_NAME, "thaw-init");
    prctl(PR_SET_DUMPABLE, 0);
    const char *failed = make_layer();
    if (failed) return 1;
    int layer = open(mount_point, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    int signals = signalfd(-1, &blocked, SFD_CLOEXEC | SFD_NONBLOCK);
    for (;;) {
        struct pollfd wait[3] = {{listener, POLLIN, 0}, {signals, POLLIN, 0}, {control, POLLIN, 0}};
        if (poll(wait, 3, control < 0 ? orphan_s * 1000 : -1) == 0) return 0;  // nobody came
        if (wait[1].revents) {
            struct signalfd_siginfo info;
            while (read(signals, &info, sizeof info) > 0) {}
            reap();
        }
        if (control >= 0 && wait[2].revents) {
            int length = receive_from(control, buffer, fds, &fd_count);
            if (length > 0) {
                handle(buffer, length, fds, fd_count, &blocked);
            } else {
                close(control);
                control = -1;
            }
        }
        if (wait[0].revents) welcome(listener, layer);
    }
}

int main(int count, char **arguments) {
    if (count != 4) { dprintf(2, "usage: init LISTENER_FD MOUNT_POINT ORPHAN_S\n"); return 2; }
    int listener = atoi(arguments[1]), orphan_s = atoi(arguments[3]);
    join(mount_point, sizeof mount_point, arguments[2], "");
    fcntl(listener, F_SETFD, FD_CLOEXEC);
    struct { unsigned long long flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls; } clone_args = {
        CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_PARENT, 0, 0, 0, 0, 0, 0, 0};
    pid_t child = syscall(SYS_clone3, &clone_args, sizeof clone_args);
    if (child < 0) { dprintf(2, "thaw-init: clone3: %s\n", strerror(errno)); return 1; }
    if (child == 0) {
        int null = open("/dev/null", O_RDWR | O_CLOEXEC);
        if (null < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0) return 1;  // the caller reads our output to its end
        close(null);
        return serve(listener, orphan_s);
    }
    dprintf(1, "%d\n", child);
    return 0;
}

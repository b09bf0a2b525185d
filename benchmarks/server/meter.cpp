// meter REPORT COMMAND...: runs a command and writes what it cost to REPORT, as JSON.
//
// A process of its own, because a peak RSS survives exec: a command started by a Python process of 60 MiB would never
// show less than that. Descendants are counted with their ancestors once they are reaped; orphans come to us.
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static double seconds(const timeval& t) { return double(t.tv_sec) + double(t.tv_usec) * 1e-6; }

static double now() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

int main(int argc, char** argv) {
    if (argc < 3) {
        fputs("usage: meter REPORT COMMAND...\n", stderr);
        return 2;
    }
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    const double start = now();
    const pid_t child = fork();
    if (child == 0) {
        execvp(argv[2], argv + 2);
        perror(argv[2]);
        _exit(127);
    }
    int status = 0;
    rusage usage{};
    if (child < 0 || wait4(child, &status, 0, &usage) != child) {
        perror("meter");
        return 2;
    }
    const double wall = now() - start;
    while (waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    getrusage(RUSAGE_CHILDREN, &usage);
    const int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    FILE* report = fopen(argv[1], "w");
    if (!report) {
        perror(argv[1]);
        return 2;
    }
    fprintf(report, "{\"wall_s\": %.6f, \"user_s\": %.6f, \"system_s\": %.6f, \"max_rss_bytes\": %ld, \"exit_code\": %d}\n",
            wall, seconds(usage.ru_utime), seconds(usage.ru_stime), usage.ru_maxrss * 1024L, code);
    return fclose(report) == 0 ? 0 : 2;
}

/*
 * Runs a program and tells the most memory that it had at once:  peak PROGRAM ARGUMENT...
 * The last line of its output is the number of bytes.
 */
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    pid_t child = fork();
    if (child == 0) {
        execv(argv[1], argv + 1);
        _exit(127);
    }
    int how;
    struct rusage usage;
    if (child < 0 || waitpid(child, &how, 0) != child || getrusage(RUSAGE_CHILDREN, &usage) != 0)
        return 1;
    printf("%ld\n", usage.ru_maxrss * 1024L); /* Linux counts it in KiB */
    return WIFEXITED(how) ? WEXITSTATUS(how) : 1;
}

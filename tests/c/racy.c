/* A race, to see that ThreadSanitizer sees one. */
#include <pthread.h>

static int number;

static void *add(void *unused)
{
    (void)unused;
    for (int i = 0; i < 100000; i++)
        number++;
    return NULL;
}

int main(void)
{
    pthread_t other;
    pthread_create(&other, NULL, add, NULL);
    add(NULL);
    pthread_join(other, NULL);
    return 0;
}

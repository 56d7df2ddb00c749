/* Stands before NVIDIA's driver: loads the image in MOR_TIMELINE_IMAGE where the library loads its kernels, and writes
 * the records of timeline.h to MOR_TIMELINE_FILE when they are unloaded. Everything else goes to the driver itself,
 * beside which it is linked as libcuda_real.so (timeline.py). */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *real(const char *name) {
    void *driver = dlopen("libcuda_real.so", RTLD_NOW);
    void *function = driver ? dlsym(driver, name) : NULL;
    if (!function) {
        fprintf(stderr, "timeline: the driver has no %s\n", name);
        exit(1);
    }
    return function;
}

/* The module of the image. */
static void *timed;

int cuModuleLoadData(void **module, const void *image) {
    int (*load)(void **, const void *) = (int (*)(void **, const void *))real("cuModuleLoadData");
    const char *path = getenv("MOR_TIMELINE_IMAGE");
    /* The kernels are a cubin, and what sets the conditions of graphs is PTX. */
    if (!path || memcmp(image, "\177ELF", 4)) return load(module, image);
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(1);
    }
    fseek(file, 0, SEEK_END);
    const long bytes = ftell(file);
    rewind(file);
    char *other = malloc(bytes);
    if (!other || fread(other, 1, bytes, file) != (size_t)bytes) {
        fprintf(stderr, "timeline: cannot read %s\n", path);
        exit(1);
    }
    fclose(file);
    const int status = load(module, other);
    free(other);
    timed = *module;
    return status;
}

static void write_variable(void *module, const char *name, FILE *file) {
    int (*find)(unsigned long long *, size_t *, void *, const char *) =
        (int (*)(unsigned long long *, size_t *, void *, const char *))real("cuModuleGetGlobal_v2");
    int (*copy)(void *, unsigned long long, size_t) = (int (*)(void *, unsigned long long, size_t))real("cuMemcpyDtoH_v2");
    unsigned long long place;
    size_t bytes;
    int status = find(&place, &bytes, module, name);
    char *copied = status ? NULL : malloc(bytes);
    if (copied) status = copy(copied, place, bytes);
    if (!copied || status || fwrite(copied, 1, bytes, file) != bytes) {
        fprintf(stderr, "timeline: cannot have %s (status %d)\n", name, status);
        exit(1);
    }
    free(copied);
}

int cuModuleUnload(void *module) {
    const char *path = getenv("MOR_TIMELINE_FILE");
    if (path && module == timed) {
        FILE *file = fopen(path, "wb");
        if (!file) {
            perror(path);
            exit(1);
        }
        write_variable(module, "mor_records_written", file);
        write_variable(module, "mor_records", file);
        fclose(file);
        timed = NULL;
    }
    int (*unload)(void *) = (int (*)(void *))real("cuModuleUnload");
    return unload(module);
}

/* A client without any library of ours, and when linked statically without any shared one: it maps two pages, has the
 * device copy from one to the other, and compares. Layouts are written out, as a program of another project has them. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

struct ioas_alloc { uint32_t size, flags, id; };
struct ioas_map { uint32_t size, flags, ioas, reserved; uint64_t address, length, iova; };
struct bind { uint32_t size, flags; int32_t iommufd; uint32_t device; };
struct attach { uint32_t size, flags, table; };
struct region { uint32_t size, flags, index, capabilities; uint64_t length, offset; };

static int failed(const char *what)
{
    perror(what);
    return 1;
}

static void command(int device, uint64_t bar, uint64_t from, uint64_t to, uint64_t how)
{
    uint64_t length = 4096, state = how;
    pwrite(device, &from, 8, bar + 0x80);
    pwrite(device, &to, 8, bar + 0x88);
    pwrite(device, &length, 8, bar + 0x90);
    pwrite(device, &state, 8, bar + 0x98);
    while (pread(device, &state, 8, bar + 0x98) == 8 && (state & 1))
        usleep(100);
}

int main(void)
{
    int iommu = open("/dev/iommu", O_RDWR);
    int device = open("/dev/vfio/devices/vfio0", O_RDWR);
    if (iommu < 0 || device < 0)
        return failed("open");
    struct ioas_alloc space = { sizeof space, 0, 0 };
    if (ioctl(iommu, 0x3b81, &space))
        return failed("IOAS_ALLOC");
    char *memory = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct ioas_map map = { sizeof map, 7, space.id, 0, (uintptr_t)memory, 8192, 0x10000 };
    struct bind bind = { sizeof bind, 0, iommu, 0 };
    struct attach attach = { sizeof attach, 0, space.id };
    struct region config = { sizeof config, 0, 7, 0, 0, 0 }, bar = { sizeof bar, 0, 0, 0, 0, 0 };
    uint16_t bus_master = 6;
    /* The mapping is made by a child: the descriptor is the same open file there, and the memory its copy. */
    pid_t child = fork();
    if (child == 0)
        _exit(ioctl(iommu, 0x3b85, &map) != 0);
    int status;
    if (waitpid(child, &status, 0) != child || status)
        return failed("IOAS_MAP in the child");
    map.iova = 0x20000;
    if (ioctl(iommu, 0x3b85, &map))
        return failed("IOAS_MAP");
    if (ioctl(device, 0x3b76, &bind))
        return failed("BIND");
    struct { uint32_t size, ioas; uint64_t iova, length; } unmap = { 24, space.id, 0x10000, 8192 };
    if (ioctl(iommu, 0x3b86, &unmap))
        return failed("IOAS_UNMAP of what the child has mapped");
    if (ioctl(device, 0x3b77, &attach))
        return failed("ATTACH");
    if (ioctl(device, 0x3b6c, &config) || ioctl(device, 0x3b6c, &bar))
        return failed("GET_REGION_INFO");
    if (pwrite(device, &bus_master, 2, config.offset + 4) != 2)
        return failed("bus master");
    memset(memory, 0x5a, 4096);
    command(device, bar.offset, 0x20000, 0x40000, 1);
    command(device, bar.offset, 0x40000, 0x21000, 3);
    if (memcmp(memory, memory + 4096, 4096))
        return failed("the copy differs");
    puts("the C client's bytes are right");
    return 0;
}

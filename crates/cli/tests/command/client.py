# A client in another language, which forks: parent and child share one open /dev/iommu.
import ctypes, fcntl, mmap, os, struct, sys

iommu = os.open("/dev/iommu", os.O_RDWR)


def call(number, layout, *values):
    argument = bytearray(struct.pack(layout, struct.calcsize(layout), *values))
    fcntl.ioctl(iommu, 0x3B00 + number, argument)
    return struct.unpack(layout, argument)


space = call(0x81, "=III", 0, 0)[2]
memory = mmap.mmap(-1, 1 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
child = os.fork()
if child == 0:
    other = call(0x81, "=III", 0, 0)[2]
    call(0x85, "=IIIIQQQ", 7, other, 0, address, 1 << 20, 0)
    os._exit(0 if other != space else 1)
if os.waitpid(child, 0)[1] != 0:
    sys.exit("the child failed")
for page in range(256):
    call(0x85, "=IIIIQQQ", 7, space, 0, address + page * 4096, 4096, page << 20)
try:
    call(0x86, "=IIQQ", space, 4096, 4096)
    sys.exit("unmapped what was not mapped")
except FileNotFoundError:
    pass
unmapped = call(0x86, "=IIQQ", space, 0, 2**64 - 1)[3]
assert unmapped == 1 << 20, unmapped
print("the Python client is content")

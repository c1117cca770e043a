from tasks.verification import *
import unclip.files as f, errno


def bad(u):
    raise OSError(errno.EIO, "Input/output error")


f.digest = bad
open("/tmp/rv/x.bin", "wb").write(b"1")
try:
    print(check_all([Item("/tmp/rv/x.bin", 1, "", "", sha256="0")], 1))
except Exception as e:
    print(type(e), e)

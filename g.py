import time
from tasks.untrusted import robots

r = robots.Robots()
r._host("https://good", "a", lambda u: b"User-agent: *\nDisallow:")
r.set_unreached({f"https://h{i}": robots.Unreached("timeout", time.time() + 200) for i in range(5000)})
n = [0]


def load(u):
    n[0] += 1
    return b"User-agent: *"


r._host("https://new", "a", load)
n[0] = 0
r._host("https://good", "a", load)
print("good loads again:", n[0], r._size_bytes)

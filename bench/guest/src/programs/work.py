# The workload "python3": objects, dictionaries, strings, generators, big integers; no modules.
import sys

SCALE = int(open("python.size").read())


class Node:
    __slots__ = ("key", "left", "right", "count")

    def __init__(self, key):
        self.key, self.left, self.right, self.count = key, None, None, 1

    def insert(self, key):
        node = self
        while True:
            if key == node.key:
                node.count += 1
                return
            name = "left" if key < node.key else "right"
            child = getattr(node, name)
            if child is None:
                setattr(node, name, Node(key))
                return
            node = child

    def walk(self):
        if self.left:
            yield from self.left.walk()
        yield self.key, self.count
        if self.right:
            yield from self.right.walk()


def numbers(seed, count):
    for _ in range(count):
        seed = (seed * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        yield seed >> 40


def words(count):
    text = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(text[n >> s & 15] for s in (0, 4, 8, 12)) for n in numbers(3, count)]


def queens(size, row=0, columns=0, down=0, up=0):
    if row == size:
        return 1
    found = 0
    for column in range(size):
        c, d, u = 1 << column, 1 << row + column, 1 << row - column + size
        if not (columns & c or down & d or up & u):
            found += queens(size, row + 1, columns | c, down | d, up | u)
    return found


def evaluate(text):
    """Recursive descent over + - * and parentheses."""
    def factor(at):
        if text[at] == "(":
            value, at = total(at + 1)
            return value, at + 1
        end = at
        while end < len(text) and text[end].isdigit():
            end += 1
        return int(text[at:end]), end

    def product(at):
        value, at = factor(at)
        while at < len(text) and text[at] == "*":
            other, at = factor(at + 1)
            value = value * other % 1000003
        return value, at

    def total(at):
        value, at = product(at)
        while at < len(text) and text[at] in "+-":
            sign = 1 if text[at] == "+" else -1
            other, at = product(at + 1)
            value += sign * other
        return value, at

    return total(0)[0]


tree = Node(1 << 23)
for n in numbers(7, 250 * SCALE):
    tree.insert(n)
print("tree", sum(k * c for k, c in tree.walk()) % 1000000007)

counts = {}
for word in words(400 * SCALE):
    counts[word] = counts.get(word, 0) + 1
top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
print("words", len(counts), top)

print("queens", queens(6 if SCALE < 30 else 7))

source = "+".join(f"({n % 97}*{n % 89}-{n % 13})*{n % 7}" for n in numbers(11, 60 * SCALE))
print("expression", evaluate(source))

factorial = 1
for n in range(1, 8 * SCALE):
    factorial *= n
sys.set_int_max_str_digits(0)
print("digits", sum(map(int, str(factorial)[:400])))

lines = [f"{i:05d} {w:>8} {i * 0.37:.3f}" for i, w in enumerate(words(60 * SCALE))]
print("lines", sum(len(line.split()[2]) for line in lines), lines[-1])

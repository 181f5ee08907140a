#!/usr/bin/env python3
"""Turns a preprocessed .cu file (g++ -E with device.h) into C++ that g++ compiles: python3 translate.py NAME < in > out

    __global__ void f(P p) { .. }   a static function, and behind it the registration that the driver finds it by
    __shared__ T a[n], b;           references to the block's copy of a struct of them
    extern __shared__ T a[];        a pointer to the block's dynamic shared memory

Limits: kernels are no templates, and `extern __shared__` stands inside a function.
"""

import re
import sys

GLOBAL = re.compile(r'(extern\s+"C"\s+)?\bEMULATOR_GLOBAL\b')
BOUNDS = "EMULATOR_BOUNDS"
SHARED = re.compile(r"\b(?P<storage>(?:extern\s+|static\s+)?)EMULATOR_SHARED\b(?P<declaration>[^;]*);")
ATTRIBUTE = re.compile(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)|alignas\s*\((?:[^()]|\([^()]*\))*\)")
CLOSING = {"(": ")", "{": "}", "[": "]"}


def matching(text, start):
    """The place of the bracket that closes the one at `start`; brackets in literals do not count."""
    opening, closing = text[start], CLOSING[text[start]]
    depth = 0
    literal = r"\"(?:\\.|[^\"\\\n])*\"|(?<![0-9a-zA-Z_])'(?:\\.|[^'\\\n])+'"
    token = re.compile(f"{literal}|{re.escape(opening)}|{re.escape(closing)}")
    for found in token.finditer(text, start):
        depth += {opening: 1, closing: -1}.get(found.group(), 0)
        if depth == 0:
            return found.start()
    raise SystemExit(f"translate.py: {opening} is not closed: {text[start:start + 80]!r}")


def declarators(declaration):
    """Splits at the commas that separate the variables of a declaration."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(declaration):
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            parts.append(declaration[start:place])
            start = place + 1
    return parts + [declaration[start:]]


def name_of(declarator):
    names = re.findall(r"[A-Za-z_]\w*", declarator.split("[")[0])
    return names[-1]


class Shared:
    """Rewrites the declarations of shared variables."""

    def __init__(self):
        self.count = 0

    def __call__(self, found):
        declaration = found["declaration"]
        if found["storage"].startswith("extern"):
            return self.dynamic(ATTRIBUTE.sub("", declaration))
        self.count += 1
        struct, variable = f"EmulatorShared{self.count}", f"emulator_shared_{self.count}"
        names = [name_of(part) for part in declarators(ATTRIBUTE.sub("", declaration))]
        references = " ".join(f"auto& {name} = {variable}.{name};" for name in names)
        return (f"struct {struct} {{ {declaration}; }}; "
                f"{struct}& {variable} = ::emulator::static_shared<{struct}>(); {references}")

    @staticmethod
    def dynamic(declaration):
        found = re.fullmatch(r"\s*(.*?)\s*\b(\w+)\s*\[\s*\]\s*", declaration, re.DOTALL)
        if found is None:
            raise SystemExit(f"translate.py: not understood: extern __shared__{declaration}")
        kind, name = found.groups()
        return f"{kind}* {name} = static_cast<{kind}*>(::emulator::dynamic_shared());"


def take_bounds(text, start, end):
    """Removes the launch bounds between two places; gives the text and the first bound."""
    place = text.find(BOUNDS, start, end)
    if place < 0:
        return text, "0"
    opening = text.index("(", place)
    closing = matching(text, opening)
    return text[:place] + text[closing + 1:], f"::emulator::first_of({text[opening + 1:closing]})"


def rewrite_kernels(text, file):
    place = count = 0
    while found := GLOBAL.search(text, place):
        start = found.start()
        end = text.find("{", start)
        text, bounds = take_bounds(text, start, end)
        text = text[:start] + "static" + text[start + len(found.group()):]
        name = re.compile(r"\b(\w+)\s*\(").search(text, start)
        closing = matching(text, text.index("(", name.end() - 1))
        place = closing
        following = re.compile(r"\s*(#[^\n]*\n\s*)*").match(text, closing + 1).end()
        is_template = text[:start].rstrip().endswith(">")
        if text[following] != "{" or is_template:
            continue
        place = matching(text, following) + 1
        count += 1
        text = text[:place] + registration(name[1], file, bounds, count) + text[place:]
    return text


def registration(name, file, bounds, count):
    return (f" static const ::emulator::Registration emulator_registration_{count}("
            f"::emulator::Caller<decltype(&{name}), &{name}>::describe(\"{name}\", \"{file}\", {bounds}));")


def main():
    text = SHARED.sub(Shared(), sys.stdin.read())
    sys.stdout.write(rewrite_kernels(text, sys.argv[1]))


main()

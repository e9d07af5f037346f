"""Write the comments of the dataclasses in nbs_lib/settings.py into settings.ini."""

import inspect
import re
import textwrap
from pathlib import Path

from nbs_lib.settings import SECTIONS


def read_comments(section: str) -> dict[str, str]:
    "Return the comment of each key of `section`: the lines above its field and the one behind it."
    comments, above = {}, []
    for kind in reversed(SECTIONS[section].__mro__[:-1]):
        for line in map(str.strip, inspect.getsource(kind).splitlines()):
            field = re.match(r"(\w+): [^#]+(?:# (.+))?$", line)
            if line.startswith("# "):
                above.append(line[2:])
            elif field:
                comments[field[1]] = " ".join([*above, field[2] or ""]).strip()
                above = []
    return comments


def write_comments(text: str) -> str:
    "Return the text of a settings file with the comments of the dataclasses in its sections without overlay."
    lines, above, comments = [], [], {}
    for line in text.splitlines():
        if line.startswith("#"):
            above.append(line)
            continue
        section, key = re.match(r"\[(.+)\]", line), re.match(r"(\w+) *=", line)
        comment = comments.get(key[1]) if key else None
        if section:
            known = section[1] in SECTIONS
            comments = read_comments(section[1]) if known else {}
            comment = SECTIONS[section[1]].__doc__ if known else None
        if comment:
            above = textwrap.wrap(comment, 110, initial_indent="# ", subsequent_indent="# ")
        lines += [*above, line]
        above = []
    return "\n".join([*lines, *above]) + "\n"


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "settings.ini"
    path.write_text(write_comments(path.read_text(encoding="utf-8")), encoding="utf-8")

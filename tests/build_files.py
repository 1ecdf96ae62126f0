"""What ffi/CMakeLists.txt compiles, and with which flags."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Flags = dict[str, list[str]]  # source, from the top of the repository -> what it is compiled with, in order


def cmake() -> dict[str, Flags]:
    """Libraries on x86-64, from the commands that list sources and flags."""
    text = re.sub(r"#[^\n]*", "", (ROOT / "ffi/CMakeLists.txt").read_text())
    lists = {name: words for name, words in re.findall(r"set\((\w+) ([^)]*)\)", text)}

    def words(found: str) -> list[str]:
        for name in re.findall(r"\$\{(avx\w+)\}", found):
            found = found.replace(f"${{{name}}}", " ".join(words(lists[name])))
        return re.split(r"[\s;]+", found.strip(' "\n'))

    everywhere = [f"-std=gnu++{lists['CMAKE_CXX_STANDARD']}", f"-fvisibility={lists['CMAKE_CXX_VISIBILITY_PRESET']}"]
    everywhere += ["-fvisibility-inlines-hidden"] * (lists["CMAKE_VISIBILITY_INLINES_HIDDEN"] == "ON")
    of_library = dict(re.findall(r"target_compile_options\((libdsv4_\w+) PRIVATE ([^)]*)\)", text))
    of_source = dict(re.findall(r"set_source_files_properties\((\S+) PROPERTIES COMPILE_OPTIONS ([^)]*)\)", text))
    return {
        library: {
            f"ffi/{source}": everywhere + words(of_library[library]) + (words(of_source[source]) if source in of_source else [])
            for source in words(sources)
        }
        for library, sources in re.findall(r"jax_dsv4_library\((libdsv4_\w+)([^)]*)\)", text)
    }

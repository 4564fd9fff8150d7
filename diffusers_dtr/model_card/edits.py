"""Keep what was edited by hand when a card is generated anew.

Every generated part carries a digest of what was generated: a section of text in the HTML comment that opens it, a
key of the metadata in one comment, the seal, which also has the digest of the whole card. A part that no longer has
its digest was edited, and is its editor's from then on, as is all that lies outside such parts. Nothing else needs to
be remembered, so that a card may be edited in its folder or on the Hub.
"""

from __future__ import annotations

import hashlib
import logging
import re


logger = logging.getLogger(__name__)

# In a template, the opening comment has no digest yet.
_SECTION = re.compile(
    r"<!-- diffusers-dtr:begin (?P<name>[\w-]+)(?: (?P<digest>[0-9a-f]+))? -->\n"
    r"(?P<body>.*?)"
    r"<!-- diffusers-dtr:end (?P=name) -->",
    re.DOTALL,
)
_SEAL = re.compile(r"<!-- diffusers-dtr:seal(?: (?P<card>[0-9a-f]+))?(?P<keys>(?: [\w-]+=[0-9a-f]+)*) -->")
_METADATA = re.compile(r"\A---\n(?P<keys>.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_METADATA_KEY = re.compile(r"^(?=[\w-]+[ \t]*:)", re.MULTILINE)


def seal_card(card: str) -> str:
    """Mark all parts of a card as generated.

    Args:
        card: A card whose template has the comment `<!-- diffusers-dtr:seal -->`, and sections between
            `<!-- diffusers-dtr:begin NAME -->` and `<!-- diffusers-dtr:end NAME -->`, each on a line of its own.

    Returns:
        The card with their digests.
    """
    card = _SECTION.sub(lambda section: _marked(section["name"], section["body"]), card)
    return _sealed(card, {key: _digest(text) for key, text in _metadata(card)})


def was_edited(card: str) -> bool:
    """Whether a card is other than it was when it was last sealed, or never was."""
    card = _unix(card)
    seal = _SEAL.search(card)
    return seal is None or seal["card"] != _digest(_with_seal(card, ""))


def refresh_card(card: str, generated: str) -> str:
    """Renew those parts of a card that are as they were generated.

    An edited section or metadata key stays, and is named in a warning; a deleted one stays deleted. A metadata key
    that `generated` does not have stays too. Line endings are those of `card`.

    Args:
        card: The card as it is now, edited or not.
        generated: What [`seal_card`] returned for the card as it would be without any edits.

    Returns:
        The card.
    """
    if _unix(card) != card:
        return refresh_card(_unix(card), generated).replace("\n", "\r\n")
    renewed = {section["name"]: section["body"] for section in _SECTION.finditer(generated)}

    def renew(section: re.Match) -> str:
        name = section["name"]
        if section["digest"] != _digest(section["body"]):
            logger.warning("The card's section %r was edited by hand and stays as it is.", name)
            return section[0]
        return _marked(name, renewed[name]) if name in renewed else section[0]

    return _refresh_metadata(_SECTION.sub(renew, card), generated)


def latest_edit(local: str | None, published: str | None) -> str | None:
    """Which of two versions of a card to go on from: the one that was edited since it was last sealed.

    Args:
        local: The card in a run's folder, or None.
        published: The card in its repository, or None.

    Returns:
        The one there is; of two, the local one if it was edited, and else the published one. The repository's history
        keeps the other, should both have been edited, which is a warning.
    """
    if local is None or published is None:
        return published if local is None else local
    if not was_edited(local):
        return published
    if local != published and was_edited(published):
        logger.warning(
            "The card was edited both here and in its repository. It goes on from the one here; the edits of the "
            "other are in the repository's history."
        )
    return local


def _refresh_metadata(card: str, generated: str) -> str:
    seal, metadata = _SEAL.search(card), _METADATA.match(card)
    if seal is None:
        return card
    digests = dict(pair.split("=") for pair in seal["keys"].split())
    if metadata is None:
        return _sealed(card, digests)
    new = dict(_metadata(generated))
    texts, present = [], set()
    for key, text in _metadata(card):
        present.add(key)
        if key in digests and digests[key] != _digest(text):
            logger.warning("The card's metadata %r was edited by hand and stays as it is.", key)
        elif key in digests and key in new:
            text = new[key]
            digests[key] = _digest(text)
        texts.append(text)
    added = {key: text for key, text in new.items() if key not in present and key not in digests}
    digests |= {key: _digest(text) for key, text in added.items()}
    start, end = metadata.span("keys")
    return _sealed(card[:start] + "".join([*texts, *added.values()]) + card[end:], digests)


def _metadata(card: str) -> list[tuple[str, str]]:
    """The top-level keys of a card's metadata with their text; what comes before the first has the key ''."""
    metadata = _METADATA.match(card)
    parts = [] if metadata is None else _METADATA_KEY.split(metadata["keys"])
    return [(part.partition(":")[0].strip() if number else "", part) for number, part in enumerate(parts) if part]


def _marked(name: str, body: str) -> str:
    return f"<!-- diffusers-dtr:begin {name} {_digest(body)} -->\n{body}<!-- diffusers-dtr:end {name} -->"


def _sealed(card: str, digests: dict[str, str]) -> str:
    keys = "".join(f" {key}={digest}" for key, digest in digests.items())
    return _with_seal(card, f" {_digest(_with_seal(card, ''))}{keys}")


def _with_seal(card: str, content: str) -> str:
    return _SEAL.sub(lambda _: f"<!-- diffusers-dtr:seal{content} -->", card, count=1)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unix(text: str) -> str:
    """The text with its line endings replaced, if all of them are those of Windows."""
    return text.replace("\r\n", "\n") if text.count("\r\n") == text.count("\n") else text

"""Bring the library's index up to date with the disk. Shared by the window's worker and the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from app.core.errors import WeftError
from app.core.paths import Paths
from app.core.roots import Root, RootKind, found_roots, own_roots
from app.store.library import LibraryStore
from app.store.settings import Settings

if TYPE_CHECKING:
    from app.core.scan import Entry

_BATCH = 200


def library_roots(settings: Settings, paths: Paths) -> list[Root]:
    """The roots that the user's settings ask for: the starter, Weft's own, other programs', and added folders."""
    wanted = {
        RootKind.HUGGING_FACE: settings.index_hugging_face,
        RootKind.LM_STUDIO: settings.index_lm_studio,
        RootKind.OLLAMA: settings.index_ollama,
        RootKind.TEXT_GENERATION_WEBUI: settings.index_text_generation_webui,
    }
    roots = own_roots(paths)
    if settings.downloads:
        roots.append(Root(path=settings.downloads))
    # Folders that the user named come before what was found, so that they are filed under the user's name.
    roots.extend(Root(path=path) for path in settings.roots)
    roots.extend(root for root in found_roots() if wanted[root.kind])
    unique = {root.path: root for root in reversed(roots)}
    return [root for root in roots if unique.pop(root.path, None) is not None]


def refresh(
    store: LibraryStore,
    roots: Iterable[Root],
    *,
    problem: Callable[[WeftError], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
    changed: Callable[[], None] = lambda: None,
    folders: Callable[[list[str]], None] = lambda _: None,
) -> int:
    """Index these roots and drop what lies under no root any more.

    Args:
        problem: told of what could not be read. cancelled: asked often; what was found until then is kept.
        changed: called after each batch that changed the index.
        folders: called once at the end with every folder that was looked into.

    Returns:
        How many entries were added, changed or removed.

    Raises:
        WeftError: as `Database.execute` does.
    """
    from app.core.scan import Scan  # readers of every format: the window's first paint does not wait for them

    scan = Scan(problem, cancelled)
    listed = list(roots)
    changes = 0
    seen: set[str] = set()
    for root in listed:
        known = store.known(root.path)
        batch: list[Entry] = []
        signatures: dict[str, str] = {}
        for found in scan.root(root, known):
            seen.add(found.id)
            if found.entry is not None:
                batch.append(found.entry)
                signatures[found.id] = found.signature
            if len(batch) >= _BATCH:
                store.put(batch, signatures)
                changes += len(batch)
                changed()
                batch, signatures = [], {}
        if cancelled():
            break
        store.put(batch, signatures)
        gone = [key for key in known if key not in seen]
        store.remove(gone)
        changes += len(batch) + len(gone)
        if batch or gone:
            changed()
    else:
        kept = {root.path for root in listed}
        for path in store.roots():
            if path not in kept:
                gone = [key for key in store.known(path) if key not in seen]
                store.remove(gone)
                changes += len(gone)
                if gone:
                    changed()
    folders(scan.folders)
    return changes

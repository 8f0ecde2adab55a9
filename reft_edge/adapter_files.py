"""What is done with adapter files, as functions: convert them, merge them, push them to a repository and pull them from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.arguments import AdapterFile, Report, checked, listed, scaled, silent, trusted_keys
from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra

if TYPE_CHECKING:
    from reft_edge.adapter.merging import Merged
    from reft_edge.convert.formats import Converted
    from reft_edge.shipping.pull import Pulled
    from reft_edge.shipping.release import Release


@checked
@extra("train")
def convert(
    source: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    folder: str | Path | None = None,
    positions: str | None = None,
    act_fn: str | None = None,
    intervention: str | None = None,
    raw: bool | None = None,
    report: Report = silent,
) -> "Converted":
    """Convert an adapter of another library to ours, or ours to one of theirs; the names tell the formats.

    `source`: a folder or Hub id of pyreft or AdapterHub, a control vector (.gguf), a packed file (.onnx_adapter), or an
    adapter file (.safetensors). `output`: an adapter file, or what one is converted to: .gguf, .onnx_adapter, .json for EasySteer,
    or a folder for pyreft. `model`, or an exported `folder`: the base, where the source does not say it. `positions`,
    `act_fn`, `intervention`, `raw`: what the source's format does not store. `report` is told what a user must know.

    Gives the formats as `source` and `result`, and the `adapter`. Raises ReftEdgeError for what is missing or cannot be carried.

    >>> reft_edge.convert("pirate.safetensors", "pirate-pyreft").result
    'pyreft'
    """
    from reft_edge.convert.formats import Given
    from reft_edge.convert.formats import convert as convert_file

    given = Given(
        None if model is None else str(model),
        None if folder is None else Path(folder),
        positions,
        act_fn,
        intervention,
        raw,
    )
    return convert_file(str(source), Path(output), given, report)


@checked
def merge(
    adapters: Sequence[AdapterFile],
    output: str | Path,
    *,
    rank: int | None = None,
    raw: bool | None = None,
) -> "Merged":
    """Merge adapters of one base into one file that does what they do at once.

    `adapters`: files, or pairs of a file and its scale; a text can be `FILE[0:2]:0.7`, with columns of the rank and a scale.
    `rank`: compress every place and position group to it; exact by default. `raw`: the prompt format of the result, by
    default that of the sources.

    Gives the merged `adapter`, and the relative `error` of its edit, 0 if exact. Raises ReftEdgeError for what one file cannot
    hold, BaseMismatchError for adapters of different bases.

    >>> merged = reft_edge.merge(["pirate.safetensors", ("pirate.safetensors", 0.5)], "both.safetensors")
    >>> merged.error
    0.0
    """
    from reft_edge.adapter.merging import Source, parse_source, save_merged
    from reft_edge.adapter.merging import merge as merge_files
    from reft_edge.files import check_place

    check_place(Path(output))
    sources = [
        parse_source(given) if isinstance(given, str) else Source(*scaled([given])[0])
        for given in listed(adapters)
    ]
    merged = merge_files(sources, rank, raw)
    save_merged(merged, Path(output))
    return merged


@checked
@extra("ship")
def push(
    files: str | Path | Sequence[str | Path],
    repository: str | Path,
    *,
    name: str | None = None,
    plain_http: bool = False,
) -> "list[Release]":
    """Add adapter files to a repository, each as the next version of its name.

    `repository`: a folder, hf://OWNER/REPO (each made if it is not there) or oci://HOST/REPO[:TAG]. `name`: of a single
    file there; by default its own without the ending. `plain_http`: talk to other machines without encryption, too.

    Gives a release for each, with `name`, `version`, `size` in bytes and `digest`. Raises ReftEdgeError for a file that is no
    adapter, two of one name, or a repository that cannot be written.

    >>> [release] = reft_edge.push("pirate.safetensors", "adapters")
    >>> release.name, release.version
    ('pirate', 1)
    """
    from reft_edge.shipping.address import open_repository
    from reft_edge.shipping.release import read_goods

    paths = [Path(path) for path in listed(files)]
    if name is not None and len(paths) > 1:
        raise ReftEdgeError("--name is for one FILE")
    target = open_repository(str(repository), plain_http)
    goods = [read_goods(path, name) for path in paths]
    if len({item.name for item in goods}) < len(goods):
        raise ReftEdgeError("two files have the same name; push one of them with another --name")
    return target.publish(goods)


@checked
@extra("ship")
def pull(
    repository: str | Path,
    store: str | Path,
    names: str | Sequence[str] = (),
    *,
    version: int | None = None,
    folder: str | Path | None = None,
    max_bytes: int | None = None,
    require_signed: str | Path | None = None,
    plain_http: bool = False,
    report: Report = silent,
) -> "list[Pulled]":
    """Install the newest version of adapters from a repository, checked and all at once.

    `repository`: a folder, https://HOST/PATH/, hf://OWNER/REPO or oci://HOST/REPO[:TAG]. `store`: the folder of adapters to
    install into; made if it is not there. `names`: which adapters, all by default. `version`: that one of one
    adapter. `folder`: only adapters for the model in this exported folder. `max_bytes`: of all downloads, 2,000,000,000 by
    default. `require_signed`: a file of trusted keys. `plain_http`: talk to other machines without encryption, too.

    Gives what became of each: `status` is installed, current, kept or failed, and `reason` says why. Raises ReftEdgeError if
    the repository cannot be read or has no such adapter.

    >>> release = reft_edge.push("pirate.safetensors", "shop", name="captain")
    >>> [pulled] = reft_edge.pull("shop", "installed")
    >>> pulled.name, pulled.status
    ('captain', 'installed')
    """
    from reft_edge.model.manifest import load_manifest
    from reft_edge.shipping.address import open_repository
    from reft_edge.shipping.pull import MAX_BYTES
    from reft_edge.shipping.pull import pull as pull_adapters
    from reft_edge.shipping.store import DeviceStore

    return pull_adapters(
        open_repository(str(repository), plain_http),
        DeviceStore(Path(store)),
        listed(names),
        version,
        None if folder is None else load_manifest(Path(folder)),
        trusted_keys(require_signed),
        report,
        MAX_BYTES if max_bytes is None else max_bytes,
    )

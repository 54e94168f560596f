"""A bundle as Kubernetes objects, and back."""

import base64
import gzip
from pathlib import Path

import pytest
import yaml
from publish_kit import Desk
from signing_kit import signed

from casparian_flow.domain.errors import UsageError
from casparian_flow.kube.bundles import bundle_digest, from_inlined, unzipped, zipped
from casparian_flow.kube.emit import objects_for, to_yaml
from casparian_flow.kube.models import INLINE_CHARS_MAX, plugin_of
from casparian_flow.kube.names import BUNDLE_KEY
from casparian_flow.trust.bundle import BUNDLE_BYTES_MAX, Bundle, make_bundle, pack, unpack
from casparian_flow.trust.errors import BundleError

LOCK = (Path(__file__).parents[2] / "uv.lock").read_text("utf-8")[:400_000]
"""As much as real plugins have, and as hard to compress."""
SOURCE = "class Handler: pass\n"


def test_a_small_bundle_is_within_the_object() -> None:
    bundle = signed(SOURCE)
    emitted = objects_for(bundle)
    (document,) = yaml.safe_load_all(to_yaml(emitted.objects))
    spec = plugin_of(document).spec
    assert spec.source.config_map is None
    assert spec.version == bundle.version
    assert unpack(from_inlined(spec.source.inline or "")) == bundle
    assert emitted.next_command("a b.yaml") == (
        "kubectl apply -f 'a b.yaml' && "
        f"kubectl wait --for=condition=Ready --timeout=5m casparianplugin/{emitted.plugin}"
    )


def test_a_bundle_with_a_real_lock_file_is_in_an_immutable_config_map() -> None:
    bundle = make_bundle("a_b", "1.0.0", SOURCE, LOCK)
    config_map, plugin = yaml.safe_load_all(to_yaml(objects_for(bundle).objects))
    assert config_map["immutable"] is True
    source = plugin_of(plugin).spec.source
    assert source.inline is None
    assert source.config_map is not None
    assert source.config_map.name == config_map["metadata"]["name"]
    text = config_map["binaryData"][source.config_map.key]
    assert len(text) > INLINE_CHARS_MAX
    assert source.config_map.key == BUNDLE_KEY
    packed = from_inlined(text)
    assert bundle_digest(packed) == source.config_map.digest
    assert unpack(packed) == bundle


def test_equal_bundles_give_equal_files_and_other_bytes_another_config_map() -> None:
    def written(source: str) -> str:
        return to_yaml(objects_for(make_bundle("sales", "1.0.0", source, LOCK)).objects)

    first = written(SOURCE)
    assert first == written(SOURCE)
    config_maps = [next(yaml.safe_load_all(t)) for t in (first, written(SOURCE + "#"))]
    assert config_maps[0]["metadata"]["name"] != config_maps[1]["metadata"]["name"]


def test_plugins_whose_names_look_alike_get_objects_of_their_own() -> None:
    names = {objects_for(make_bundle(n, "1", SOURCE)).plugin for n in ("a-b", "a_b", "a.b", "A-b")}
    assert len(names) == 4
    assert "a-b" in names


def test_a_large_config_map_is_applied_by_the_server_and_too_large_a_bundle_is_refused() -> None:
    def with_lock(size: int) -> Bundle:
        noise = "".join(bundle_digest(str(i).encode()) for i in range(size // 64))
        return make_bundle("sales", "1.0.0", SOURCE, noise)

    assert "apply --server-side" in objects_for(with_lock(400_000)).next_command("x.yaml")
    with pytest.raises(UsageError, match="Kubernetes takes") as refused:
        objects_for(with_lock(2_000_000))
    assert "samples" in refused.value.hint


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("not base64!", "no base64"),
        (base64.b64encode(b"no gzip").decode(), "no readable gzip"),
        (base64.b64encode(zipped(pack(signed(SOURCE)))[:-9]).decode(), "no readable gzip"),
    ],
)
def test_what_is_no_bundle_is_told(text: str, told: str) -> None:
    with pytest.raises(BundleError, match=told):
        from_inlined(text)


def test_a_gzip_bomb_is_read_no_further_than_a_bundle_goes() -> None:
    bomb = gzip.compress(bytes(4 * BUNDLE_BYTES_MAX), compresslevel=1)
    with pytest.raises(BundleError, match="larger than any"):
        unzipped(bomb)


def test_publish_writes_the_objects_tells_the_next_command_and_deploys_nothing(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path)
    told = desk.publish("--emit-manifest", "plugin.yaml").out
    assert "CasparianPlugin sales" in told
    assert "kubectl apply -f plugin.yaml && kubectl wait" in told
    assert not desk.database.exists()
    (document,) = yaml.safe_load_all((tmp_path / "plugin.yaml").read_text())
    bundle = unpack(from_inlined(document["spec"]["source"]["inline"]))
    assert (bundle.name, bundle.version) == ("sales", "1.0.0")
    assert bundle.envelope
    assert desk.publish("--emit-manifest", "p.yaml", "-o", "json").json["manifest"] == "p.yaml"
    assert "Give one" in desk.publish("--emit-manifest", "p.yaml", "--out", "p", code=2).err
    assert "cannot be written" in desk.publish("--emit-manifest", "no/such/p", code=2).err

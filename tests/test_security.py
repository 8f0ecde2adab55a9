"""SECURITY.md, sentence by sentence, with the tests that hold it. What no other file tests is tested here."""

import ast
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread

import pytest

from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.errors import LONGEST, ReftEdgeError
from reft_edge.shipping.http import HttpRepository
from tests.adapter.test_algebra import make_adapter
from tests.helpers.servers import LoopbackServer

TESTS = Path(__file__).parent
TEXT = " ".join((TESTS.parent / "SECURITY.md").read_text(encoding="utf-8").split())

FILE, STORAGE, TORCH = "adapter/test_adapter_file", "adapter/test_storage", "convert/test_torch_files"
CONVERT, GGUF, KEYS = "convert/test_convert", "model/test_model_files", "signing/test_signing"
SIGNED, INDEX = "signing/test_signed_runtime", "shipping/test_ship_repositories"
ROOM, STORE, WEB = "shipping/test_ship_room", "shipping/test_ship_store", "shipping/test_ship_strangers"
SERVER, BODIES, LINES = "serving/test_server", "serving/test_server_bodies", "serving/test_connections"
FOLDER, TERMINAL, FUZZ = "runtime/test_adapter_folder", "commands/test_terminal_output", "test_fuzz_cases"
HERE = "test_security"

PROMISES = [
    # What is protected
    ("runs in jinja2's sandbox", "runtime/test_text::test_templates_run_in_a_sandbox"),
    (
        "its loops, its processor time (2 s) and the size of what it makes end with an error",
        "model/test_templates::test_what_a_strangers_template_begins_has_an_end",
        "model/test_templates::test_slow_work_that_counts_for_little_is_ended_by_the_clock",
    ),
    # Adapters
    (
        "executes nothing: no pickle, no code",
        f"{TORCH}::test_every_operation_of_pickles_has_an_answer",
        f"{TORCH}::test_a_pickle_of_anything_else_is_refused_without_memory",
        f"{GGUF}::test_a_folders_code_is_never_run_nor_asked_about",
    ),
    (
        "a zip that can be read in one way only",
        f"{TORCH}::test_a_zip_that_can_be_read_two_ways_is_refused",
        f"{TORCH}::test_two_entries_of_one_name_are_refused",
        f"{TORCH}::test_old_files_and_files_in_files_are_refused",
    ),
    (
        "takes memory only after the header was checked",
        f"{FILE}::test_huge_claims_cost_no_memory",
        f"{STORE}::test_a_large_file_that_is_no_adapter_takes_no_memory",
    ),
    ("at most 1 GB of tensors counted as float32", f"{STORAGE}::test_a_small_file_cannot_claim_much"),
    (
        "A pyreft tensor needs bytes of its own in the file",
        f"{TORCH}::test_two_tensors_of_one_storage",
        f"{CONVERT}::test_a_small_tensor_file_cannot_claim_much",
    ),
    ("would pad beyond 1 GB is refused", f"{CONVERT}::test_what_padding_would_blow_up_is_refused"),
    (
        "read by a strict reader of our own before any library sees them",
        f"{GGUF}::test_a_malformed_header_is_refused_before_any_reader_sees_the_file",
        f"{CONVERT}::test_a_bad_control_vector_is_refused_by_name",
    ),
    (
        "lists and sizes must be what their tensors account for",
        f"{GGUF}::test_long_lists_are_refused",
        f"{GGUF}::test_metadata_must_fit_the_tensors",
        f"{GGUF}::test_numbers_are_what_the_tensors_account_for",
    ),
    (
        "Links out of a stranger's folder are not followed, nothing but regular files is opened",
        f"{TORCH}::test_links_out_of_a_folder_and_what_is_no_file_are_refused",
        f"{FILE}::test_an_adapter_is_opened_once_and_not_waited_for",
        f"{GGUF}::test_what_is_no_file_is_not_waited_for",
        f"{CONVERT}::test_a_packed_adapter_is_not_waited_for",
    ),
    (
        "gives finite weights only, folded and scaled ones too",
        f"{FILE}::test_not_finite",
        f"{FILE}::test_weights_that_fold_to_infinity_are_refused",
        "runtime/test_mixes::test_scales_beyond_float32_leave_nothing",
    ),
    (
        "more than 8 GB of pyreft files is not fetched by `convert`",
        f"{CONVERT}::test_an_adapter_on_the_hub",
    ),
    (
        "opens no file and no address that the adapter names",
        f"{HERE}::test_an_adapter_s_description_opens_nothing",
    ),
    ("Adapter names come from a folder's listing", f"{FOLDER}::test_names_do_not_lead_out_of_the_folder"),
    (
        "puts no control characters on a terminal",
        f"{TERMINAL}::test_names_metadata_and_labels",
        f"{TERMINAL}::test_nobody_writes_around_the_clean_streams",
    ),
    (
        "Errors quote what they found, at most 4,000 characters of it",
        f"{HERE}::test_errors_have_an_end",
        f"{FUZZ}::test_errors_are_what_a_terminal_can_show",
    ),
    (
        "The base's fingerprint tells that an adapter was made for this base",
        "runtime/test_model::test_another_base_is_refused_with_both_fingerprints",
    ),
    # Signatures
    (
        "over a digest of everything else in it",
        f"{KEYS}::test_any_changed_byte_is_refused",
        f"{KEYS}::test_changed_descriptions_and_other_metadata",
        f"{KEYS}::test_a_tensor_s_declaration_has_no_room_for_what_is_not_signed",
        f"{KEYS}::test_the_digest_tells_tensors_apart",
    ),
    (
        "`run`, `chat`, `serve` and `eval` use no adapter that fails any of these",
        f"{SIGNED}::test_nothing_else_is_loaded",
        f"{SIGNED}::test_commands",
        f"{SIGNED}::test_the_server_answers_403",
        f"{SIGNED}::test_eval_in_pytorch",
    ),
    ("the signature was stripped", f"{KEYS}::test_unsigned_and_stripped"),
    ("a signature was taken from another file", f"{KEYS}::test_another_files_signature"),
    ("the key is not in the file of trusted keys", f"{KEYS}::test_foreign_keys"),
    (
        "it expired; also while the process runs",
        f"{KEYS}::test_time",
        f"{SIGNED}::test_a_signed_adapter_runs_until_its_signature_expires",
    ),
    ("5 minutes are allowed", f"{KEYS}::test_time"),
    (
        "The file is read once; what was verified is what is used",
        f"{SIGNED}::test_what_was_verified_is_what_is_used",
    ),
    ("A key's expiry ends everything it signed", f"{KEYS}::test_an_expired_key"),
    (
        "`sign` checks that a file is a usable adapter, nothing more",
        f"{KEYS}::test_only_usable_adapters_are_signed",
    ),
    # Keys
    (
        "readable by its owner only, and `--encrypt` encrypts it",
        f"{KEYS}::test_private_keys_are_kept_private",
        f"{KEYS}::test_passphrases",
    ),
    (
        "refuses a private key that other users can read. A key is never overwritten",
        f"{KEYS}::test_private_keys_are_kept_private",
    ),
    ("A file of trusted keys that every user can write is refused", f"{KEYS}::test_trusted_keys_files"),
    # Repositories
    (
        "Indexes (1.5 MB, 1,000 adapters) and manifests (64 kB) are bounded and parsed strictly",
        f"{INDEX}::test_indexes_that_are_refused",
        f"{INDEX}::test_manifests_that_are_refused",
        f"{ROOM}::test_an_index_has_a_bounded_number_of_names",
    ),
    (
        "a name can only become one plain file name in the store",
        f"{INDEX}::test_names_that_are_refused",
        f"{INDEX}::test_names_are_one_plain_part_of_a_path",
    ),
    ("a file is read up to the announced size", f"{INDEX}::test_answers_are_bounded"),
    (
        "installed only if its SHA-256 is the announced one",
        f"{INDEX}::test_a_wrong_beginning_is_dropped_and_a_wrong_file_refused",
        f"{INDEX}::test_what_is_no_adapter_is_not_installed",
        f"{INDEX}::test_the_base_is_what_the_index_says_and_the_device_has",
        f"{INDEX}::test_only_what_a_trusted_key_signed",
    ),
    (
        "Until then it has no name that the runtime sees",
        f"{STORE}::test_killed_at_every_step_it_holds_the_old_or_the_new",
        f"{STORE}::test_without_power_at_every_step_it_holds_the_old_or_the_new",
    ),
    (
        "at most 2 GB in all (`--max-bytes`), broken downloads counted",
        f"{ROOM}::test_what_a_pull_may_leave_is_bounded_over_all_names",
        f"{ROOM}::test_the_command_s_bound",
    ),
    ("The room on the disk is looked at before", f"{ROOM}::test_the_disk_is_looked_at_before"),
    (
        "is removed when that pull does not ask for it, or after a week",
        f"{ROOM}::test_parts_that_nobody_asks_for_are_removed",
        f"{ROOM}::test_another_repository_s_parts_wait_for_a_week",
    ),
    (
        "Nobody else is kept out of the store while a server is waited for",
        f"{WEB}::test_a_server_that_never_ends_keeps_nobody_out_of_the_store",
    ),
    ("Connections are encrypted unless", f"{INDEX}::test_unencrypted_connections_to_others_are_refused"),
    (
        "Each exchange ends after 15 minutes",
        f"{WEB}::test_an_exchange_ends_wherever_it_drips",
        f"{WEB}::test_the_deadline_is_one_for_all_redirects",
        f"{WEB}::test_the_login_belongs_to_the_exchange",
    ),
    ("at most 256 kB of headers", f"{WEB}::test_what_surrounds_a_body_is_bounded"),
    ("answers are not decompressed", f"{INDEX}::test_answers_are_bounded"),
    ("cookies not kept", f"{HERE}::test_cookies_are_not_kept"),
    ("At most 5 redirects are followed", f"{INDEX}::test_redirects_are_bounded_and_stay_encrypted"),
    (
        "None leads to this machine, to a private network",
        f"{WEB}::test_nobody_sends_us_to_this_machine_or_a_private_network",
        f"{WEB}::test_where_an_address_is",
    ),
    (
        "the address that is connected to is looked at, whatever the name, also for token servers and uploads",
        f"{WEB}::test_a_name_that_moves_to_this_machine_is_not_followed",
        f"{WEB}::test_token_servers_stay_out_too",
        f"{WEB}::test_uploads_and_blobs_stay_out_too",
    ),
    (
        "may redirect inside private networks",
        f"{WEB}::test_what_the_user_named_works_and_leads_to_its_own_kind",
        f"{WEB}::test_one_kind_of_inside_does_not_lead_to_another",
    ),
    ("Through a proxy of the system's settings", f"{WEB}::test_the_system_s_proxy_is_used_and_may_be_here"),
    (
        "A token goes to the server it is for",
        f"{INDEX}::test_redirects_are_followed_without_the_token",
        f"{INDEX}::test_the_hub_s_token_is_not_sent_where_files_are_stored",
    ),
    (
        "the login for a registry is sent to the token server",
        f"{INDEX}::test_tokens_are_fetched_with_docker_s_login_and_stay_with_the_registry",
        f"{INDEX}::test_a_challenge_from_another_host_gets_no_credentials",
    ),
    ("Other addresses in a manifest are not followed", f"{INDEX}::test_manifests_that_are_refused"),
    (
        "is looked up in at most 2 minutes, and what `convert` downloads is what was looked up",
        f"{CONVERT}::test_an_adapter_on_the_hub",
    ),
    ("and ends after an hour", f"{WEB}::test_a_push_to_the_hub_ends"),
    (
        "a link, FIFO or device where a file should be is refused or replaced",
        f"{ROOM}::test_an_installed_file_that_is_a_link_is_replaced_and_never_read",
        f"{ROOM}::test_a_fifo_is_no_installed_file",
        f"{ROOM}::test_a_repository_s_files_are_plain_ones",
    ),
    (
        "nothing is written through one",
        f"{ROOM}::test_push_writes_through_nothing",
        f"{ROOM}::test_a_part_that_was_planted_is_neither_read_nor_written",
        f"{STORE}::test_a_leftover_is_never_written_through",
    ),
    (
        "readable for no more users than the file",
        f"{ROOM}::test_a_copy_of_a_file_is_for_no_more_people_than_the_file",
    ),
    (
        "`pull` does not go back to an older version by itself",
        f"{STORE}::test_the_newest_is_installed_only_where_it_is_newer",
        f"{STORE}::test_what_is_older_than_what_was_rolled_back_is_not_installed",
    ),
    # The server
    ("answers only requests whose `Host` is loopback's", f"{SERVER}::test_hosts_that_are_answered"),
    ("other addresses need an API key", f"{SERVER}::test_the_command_refuses"),
    (
        "Bodies that do not say `Content-Type: application/json` are refused",
        f"{BODIES}::test_what_web_pages_may_send_without_asking_is_refused",
    ),
    (
        "one line in the log without the client's text",
        f"{SERVER}::test_what_nobody_foresaw_is_one_line_in_the_log_without_the_clients_text",
    ),
    (
        "Clients cannot upload adapters or name paths",
        f"{SERVER}::test_bodies_keys_hosts_and_other_paths",
        f"{FOLDER}::test_names_do_not_lead_out_of_the_folder",
    ),
    (
        "512, and fewer than the process may have open files",
        f"{LINES}::test_many_connections_that_say_little_lock_nobody_out",
        f"{LINES}::test_connections_stay_below_the_limit_of_open_files",
    ),
    (
        "10 seconds from the connection or the last answer",
        f"{LINES}::test_a_head_must_come_in_time",
        f"{LINES}::test_a_head_must_come_in_time_also_letter_by_letter",
    ),
    (
        "30 seconds; 64 such bodies arriving at once",
        f"{LINES}::test_a_body_must_come_in_time",
        f"{LINES}::test_bodies_under_way_are_bounded_together",
    ),
    ("an answer that is not read | 60 seconds", f"{LINES}::test_an_answer_that_nobody_reads_ends"),
    (
        "16,384, nested 64 deep; counted before the body is parsed",
        f"{BODIES}::test_too_many_values_are_refused_before_they_are_made",
    ),
    (
        "`--slots` running and `--queue` waiting",
        f"{SERVER}::test_what_neither_runs_nor_may_wait_is_told_when_to_come_back",
        f"{SERVER}::test_encoders_have_a_bounded_queue",
    ),
    (
        "`--max-inputs` (2,048), counted before they are tokenised",
        f"{BODIES}::test_prompts_are_counted_before_they_are_tokenised",
        f"{SERVER}::test_choices_beyond_the_queue_follow_as_slots_free_up",
        f"{SERVER}::test_others_come_between_the_batches_of_a_long_request",
    ),
    (
        "loaded adapters, and the mixes of running requests",
        f"{FOLDER}::test_held_adapters_and_mixes_are_bounded",
        "runtime/test_mixes::test_a_mix_that_is_too_large_is_refused_and_the_others_stay",
    ),
    (
        "KV caches of running requests | `--cache-memory` together",
        f"{SERVER}::test_requests_share_the_memory_for_kv_caches",
        "runtime/test_cache_budget::test_answers_under_a_budget_are_those_without_and_never_use_more",
    ),
    (
        "position groups of an adapter | 64",
        "adapter/test_positions::test_specs_without_end_are_refused_before_they_are_read",
    ),
    (
        "in threads beside the one that answers",
        f"{SERVER}::test_others_are_answered_while_a_request_is_prepared",
        f"{FOLDER}::test_a_slow_file_delays_no_request_for_what_is_loaded",
    ),
    (
        "What was refused of an adapter file is remembered until the file changes",
        f"{FOLDER}::test_a_refusal_is_remembered_until_the_file_changes",
    ),
    (
        "opened once, by a plain name and not through a link",
        f"{FOLDER}::test_links_swapped_in_at_any_moment_show_no_other_files",
        f"{FOLDER}::test_links_that_lead_out_are_not_followed",
    ),
    # Fuzzing
    (
        "any exception but a refusal, more than 10 seconds, or more than 64 MB",
        f"{FUZZ}::test_the_harness_notices",
    ),
    ("Cases that it found are in `tests/fuzz_cases`", f"{FUZZ}::test_found_cases_are_refused_in_plain_words"),
]
"""A few words of each promise, and the tests that hold it."""


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise[0][:40])
def test_a_promise_is_made_and_held(promise: tuple[str, ...]) -> None:
    words, *tests = promise
    assert words in TEXT, (
        "SECURITY.md says it differently now: look whether the tests still hold what it says"
    )
    for test in tests:
        name, _, function = test.partition("::")
        tree = ast.parse((TESTS / f"{name}.py").read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


_watched: list[list[tuple[str, object]]] = []
"""Where the hook below, which Python never takes back, writes to while something is watched."""


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _watched and event in ("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo"):
        _watched[-1].append((event, arguments[0]))


def test_an_adapter_s_description_opens_nothing(tmp_path):
    adapter = make_adapter("loreft")
    named = tmp_path / "secret.txt"
    named.write_text("secret")
    fields = {
        **vars(adapter.config),
        "base_name": str(named),
        "training": {"file": str(named), "url": "http://127.0.0.1:9/a", "include": f"file://{named}"},
    }
    path = tmp_path / "a.safetensors"
    save_adapter(Adapter(type(adapter.config)(**fields), adapter.tensors), path)
    load_adapter(path)
    sys.addaudithook(_watch)
    _watched.append([])
    try:
        load_adapter(path)
    finally:
        opened = _watched.pop()
    assert [what for _, what in opened if not isinstance(what, int)] == [str(path)]


def test_errors_have_an_end():
    told = str(ReftEdgeError("x" * 10**6))
    assert len(told) <= LONGEST + 100
    assert LONGEST == 4000


def test_cookies_are_not_kept():
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("cookie"))
            self.send_response(302 if len(asked) < 3 else 404)
            self.send_header("set-cookie", "who=you; Path=/")
            self.send_header("location", "/again")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = LoopbackServer(Server)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ReftEdgeError, match="404"):
            HttpRepository(f"http://127.0.0.1:{server.server_port}/").releases()
    finally:
        server.shutdown()
        server.server_close()
    assert asked == [None, None, None]

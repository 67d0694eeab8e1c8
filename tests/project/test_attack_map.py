"""What the package was attacked with, and the tests and fuzzers that hold each: told, bounded, or without effect.

`make test-attacks` and `make test-survival` make the random ones by the hundred, from a seed; the suite makes a few.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

# attack -> the tests, as "file::function"
HELD_BY = {
    # what was written is what is used
    "a byte of a checkpoint is another": [
        "training/test_survival.py::test_a_flipped_bit_in_any_file_of_a_checkpoint_is_told"
    ],
    "a file of a checkpoint is gone or cut": [
        "training/test_survival.py::test_damaged_checkpoint_is_named_and_the_one_before_offered"
    ],
    "a tool loads weights that rotted": [
        "training/test_survival.py::test_weights_that_rotted_are_loaded_by_no_tool",
        "tools/test_eval_export.py::test_records_that_rotted_are_told_before_a_weight_is_loaded",
    ],
    "reference.json or the start's weights are damaged": [
        "training/test_reference.py::test_a_resumed_adapter_is_held_against_the_start_of_the_run",
        "training/test_reference.py::test_a_run_is_not_resumed_with_another_reference",
    ],
    "a cached reference is damaged": [
        "training/test_reference_cache.py::test_a_damaged_part_is_named_removed_and_not_believed"
    ],
    "metrics.jsonl is gone, torn or ahead; two last lines after a kill": [
        "training/test_survival.py::test_a_resumed_run_has_its_log_from_the_checkpoint"
    ],
    "a cache of rows or tokens is cut, also between two batches": [
        "training/test_survival.py::test_a_cache_that_is_not_what_was_written_is_made_anew",
        "training/test_survival.py::test_a_parquet_cache_that_was_cut_is_made_anew",
    ],
    "finished.json outlives its model or its data": [
        "training/test_survival.py::test_a_finished_run_whose_model_or_data_changed_is_none"
    ],
    "the base is another than at the start": ["training/test_survival.py::test_a_changed_base_is_refused"],
    "the base lacks tensors or shards": [
        "training/test_whole_base.py::test_a_base_that_lacks_a_tensor_is_not_trained_on",
        "training/test_whole_base.py::test_a_base_of_which_a_shard_is_gone_is_refused",
    ],
    "weights become NaN in the last update": [
        "training/test_run_signals.py::test_weights_that_the_last_update_broke_are_not_saved"
    ],
    "a learning rate that is no number": [
        "tools/test_cli_usage.py::test_a_value_that_its_field_cannot_take_is_1_and_named"
    ],
    # kills and full disks
    "SIGKILL at any change of a file, in runs of six kinds": [
        "survival.py::survive",
        "training/test_survival.py::test_killed_twice_is_the_uninterrupted_run_bit_for_bit",
    ],
    "a disk that is full for a checkpoint": [
        "training/test_survival.py::test_full_disk_stops_with_the_older_checkpoint_kept",
        "tools/test_cli_usage.py::test_a_full_disk_is_told_with_the_places_that_are_written_to",
    ],
    "a disk that is full for a moment while a metric is written": [
        "training/test_survival.py::test_full_disk_loses_no_line_of_the_log",
        "training/test_survival.py::test_lines_are_added_whole_or_not_at_all",
    ],
    "a kill while a command writes its state": ["project/test_security.py::test_state_is_written_whole_or_not_at_all"],
    "a comparison's result that cannot be read": ["tools/test_compare.py::test_whole_comparison_and_its_second_start"],
    "a kill during an export": ["tools/test_eval_export.py::test_an_export_that_was_killed_is_made_anew"],
    "partial files of killed processes": [
        "data/test_damaged_files.py::test_what_killed_processes_left_half_written_is_removed_after_a_day"
    ],
    "two runs in one folder": ["training/test_survival.py::test_a_second_run_in_a_folder_is_refused"],
    # several processes
    "one of two ranks is killed, or its disk is full": [
        "training/test_rank_ends.py::test_a_rank_that_ends_ends_the_other_and_the_run_goes_on"
    ],
    "one of two ranks meets a NaN; ranks with other data or settings": [
        "training/test_distributed.py::test_two_ranks_equal_one_process"
    ],
    "the words of a process group that is gone": [
        "tools/test_errors_told.py::test_another_process_that_is_gone_is_one_sentence"
    ],
    # files, records, command lines
    "an error that nobody foresaw": [
        "tools/test_errors_told.py::test_a_foreign_error_has_what_was_done_its_words_and_what_to_do",
        "tools/test_errors_told.py::test_every_command_says_with_which_file_it_failed",
    ],
    "mutated command lines": [
        "helpers/attacks.py::attack_lines",
        "tools/test_errors_told.py::test_what_cannot_be_is_said_in_words_of_ours",
    ],
    "damaged files of every kind": [
        "helpers/attacks.py::attack_files",
        "data/test_damaged_files.py::test_a_parquet_file_that_nobody_can_read_is_named",
        "data/test_damaged_files.py::test_an_arrow_file_cut_anywhere_is_named",
        "tools/test_eval_mtbench.py::test_answers_of_another_shape_are_named",
    ],
    "records of any shape": [
        "helpers/attacks.py::attack_records",
        "data/test_data_fuzz.py::test_any_record_is_a_pair_or_a_named_problem",
    ],
    "a record without a field of its form": [
        "data/test_data_forms.py::test_record_without_a_field_of_its_form_is_named_and_skipped"
    ],
    "another encoding than UTF-8": ["data/test_bounds.py::test_another_encoding_is_refused_by_its_name"],
    "code in a checkpoint's pickles": ["project/test_security.py::test_a_checkpoint_that_holds_code_is_refused"],
    # waits and sizes
    "a judge that drips": ["tools/test_judge_endpoint.py::test_the_deadline_is_for_the_whole_reply"],
    "a judge whose reply does not end": [
        "tools/test_judge_endpoint.py::test_a_reply_without_an_end_is_not_held",
        "tools/test_judge_endpoint.py::test_a_reply_may_be_as_long_as_is_said",
    ],
    "a judge that asks for a wait of years": ["tools/test_judge_endpoint.py::test_a_judge_cannot_ask_for_a_long_wait"],
    "impossible endpoints, timeouts and keys": ["tools/test_judge_endpoint.py::test_bad_endpoints_are_named"],
    "a key with a line's end, or one that the judge repeats": [
        "tools/test_judge_endpoint.py::test_a_key_that_no_header_takes_is_refused_and_not_shown",
        "tools/test_judge_endpoint.py::test_a_key_that_the_judge_repeats_is_not_shown",
    ],
    "gzip that unpacks to a thousand times its size": [
        "data/test_bounds.py::test_gzip_out_of_all_proportion_stops_as_it_is_unpacked"
    ],
    "lines and records without an end": ["data/test_bounds.py::test_a_record_that_is_too_long_is_named_and_left_out"],
    "a prompt of megabytes": ["data/test_damaged_files.py::test_a_pair_beyond_the_bound_is_named_and_a_long_one_told"],
    "bounds that are no numbers": ["data/test_bounds.py::test_a_bound_that_is_no_number_is_refused_before_anything"],
    "a chat template that loops, grows, divides by zero or calls itself": [
        "data/test_bounds.py::test_a_template_is_bounded"
    ],
    "a record that brings its own chat template": [
        "data/test_bounds.py::test_a_record_does_not_say_how_all_are_rendered"
    ],
    # what is shown
    "control characters in names and texts": [
        "tools/test_errors_told.py::test_foreign_text_steers_no_terminal",
        "tools/test_errors_told.py::test_names_of_files_and_findings_steer_no_terminal",
    ],
    "HTML and Markdown in names": ["tools/test_markdown.py::test_a_card_shows_names_as_they_are"],
    "a base whose card is broken YAML": [
        "tools/test_markdown.py::test_a_base_whose_card_cannot_be_read_has_no_known_licence"
    ],
    "labels of models that lead out of the folder": ["tools/test_eval_compare.py::test_labels_tell_models_apart"],
}


@pytest.mark.parametrize("attack", HELD_BY)
def test_every_attack_is_held_by_tests_that_there_are(attack):
    for place in HELD_BY[attack]:
        file, _, name = place.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place

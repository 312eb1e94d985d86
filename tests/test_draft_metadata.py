"""A draft step's attention metadata is made of the policy's: one token per request, after its last verified one."""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from openrlhf_sd.engine.proposer import SelfDraftProposer


def verified() -> CommonAttentionMetadata:
    """Two requests, 10 and 20 tokens long with the four just verified."""
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([10, 20], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=8,
        max_query_len=4,
        max_seq_len=20,
        block_table_tensor=torch.zeros(2, 4, dtype=torch.int32),
        slot_mapping=torch.zeros(8, dtype=torch.int64),
    )


def test_lengths_and_what_is_computed_from_them_follow_the_rejections():
    policys = verified()
    policys.compute_num_computed_tokens()  # as the policy's attention may have: it is kept in the metadata
    policys.token_to_req_indices(torch.zeros(8, dtype=torch.int32))
    proposer = SelfDraftProposer.__new__(SelfDraftProposer)  # without its model
    proposer.arange = torch.arange(3, dtype=torch.int32)

    drafts, positions = proposer._one_token_per_request(policys, torch.tensor([1, 3], dtype=torch.int32))

    assert positions.tolist() == [8, 16]
    assert drafts.seq_lens.tolist() == [9, 17]
    assert drafts.compute_num_computed_tokens().tolist() == [8, 16]
    assert drafts.token_to_req_indices(torch.zeros(8, dtype=torch.int32)).tolist() == [0, 1]
    assert policys.seq_lens.tolist() == [10, 20]

"""Names on the wire: routes, and where a request carries a field. The fields are named as `SamplingParams` names them."""

from __future__ import annotations

EXTRA = "extra_sampling_params"
ROLLOUT_ROUTE = "/rollout/generate"
SCORE_ROUTE = "/rollout/score"
GENERATE_ROUTE = "/generate"
ABORT_ROUTE = "/abort_request"
PAUSE_ROUTE = "/pause_generation"
CONTINUE_ROUTE = "/continue_generation"
UPDATE_FROM_DISK_ROUTE = "/update_weights_from_disk"
CHECKSUM_ROUTE = "/get_weights_checksum"
VERIFY_ROUTE = "/verify_weights"
LOAD_ADAPTER_ROUTE = "/load_lora_adapter"
ADAPTER_FROM_TENSORS_ROUTE = "/load_lora_adapter_from_tensors"
UNLOAD_ADAPTER_ROUTE = "/unload_lora_adapter"
RELEASE_ROUTE = "/release_memory_occupation"
RESUME_ROUTE = "/resume_memory_occupation"
ADAPTERS_ROUTE = "/lora_adapters"
BEGIN_ROUTE = "/weights/begin"
BUCKETS_ROUTE = "/weights/{update_id}/buckets"
COMMIT_ROUTE = "/weights/{update_id}/commit"
ABANDON_ROUTE = "/weights/{update_id}/abort"
UPDATE_FROM_TENSOR_ROUTE = "/update_weights_from_tensor"
CHECK_UPDATE_ROUTE = "/update_weights_from_tensor_checker"
INIT_GROUP_ROUTE = "/init_weights_update_group"
UPDATE_FROM_GROUP_ROUTE = "/update_weights_from_distributed"
DESTROY_GROUP_ROUTE = "/destroy_weights_update_group"
UPDATE_FROM_BODY_ROUTE = "/update_weights_from_safetensors"

# Fields that a request carries in its object of further parameters, not at its top level.
EXTRA_ONLY = frozenset({"sigmas"})

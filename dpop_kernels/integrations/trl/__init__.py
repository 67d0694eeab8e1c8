"""What this package brings to scripts that stay in TRL: its products behind the head of every trainer there
(`use_dpop_head`), and DPOP's loss in TRL's DPOTrainer. Importing it checks TRL's version, which both lean on."""

from dpop_kernels.integrations.trl.version import check_trl_version

# isort: split
# after that check: what these import is not in every TRL
from dpop_kernels.integrations.trl.head import use_dpop_head
from dpop_kernels.integrations.trl.trainer import TRLDPOPConfig, TRLDPOPTrainer

__all__ = ["TRLDPOPConfig", "TRLDPOPTrainer", "check_trl_version", "use_dpop_head"]

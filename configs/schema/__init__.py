"""Every setting of Tandem, each declared once: name, type, unit, bound, default.

A chatbot is one `ChatbotConfig`, a machine one `MachineConfig`, secrets and places one `Environment`. All are imported from here.
"""

from configs.schema.chatbot import (
    METRICS,
    ChatbotConfig,
    EvaluationConfig,
    FeedbackConfig,
    GateConfig,
    GateRule,
    JudgeConfig,
    ScalingConfig,
    ServeConfig,
    WatchConfig,
)
from configs.schema.environment import Environment
from configs.schema.machine import CardConfig, DeployConfig, LendingConfig, LogConfig, MachineConfig, PoolConfig, is_loopback
from configs.schema.training import BudgetConfig, DataConfig, Dimension, LoraConfig, ModelConfig, SweepConfig, TrainConfig

__all__ = [
    "METRICS",
    "BudgetConfig",
    "CardConfig",
    "ChatbotConfig",
    "DataConfig",
    "DeployConfig",
    "Dimension",
    "Environment",
    "EvaluationConfig",
    "FeedbackConfig",
    "GateConfig",
    "GateRule",
    "JudgeConfig",
    "LendingConfig",
    "LogConfig",
    "LoraConfig",
    "MachineConfig",
    "ModelConfig",
    "PoolConfig",
    "ScalingConfig",
    "ServeConfig",
    "SweepConfig",
    "TrainConfig",
    "WatchConfig",
    "is_loopback",
]

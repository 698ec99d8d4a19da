import pytest

from onestage.tracking.redaction import names_secret, redact, redact_settings


@pytest.mark.parametrize(
    "name", ["password", "db.passwd", "MLFLOW_TRACKING_TOKEN", "clientSecret", "AWS_SECRET_ACCESS_KEY", "api-key"]
)
def test_names_of_secrets(name):
    assert names_secret(name)


@pytest.mark.parametrize("name", ["keypoints", "key", "num_tokens", "tokenizer", "keyboard", "secretary"])
def test_ordinary_names(name):
    assert not names_secret(name)


def test_settings_lose_secret_strings_alone():
    settings = {
        "tracking": {"uri": "https://ann:p@ss@host:5000/a@b", "token": "abc"},
        "detector": {"token_dim": 256, "keypoints": ["nose", "eye"], "class_token": True, "password": ""},
        "env": ["AWS_SECRET_ACCESS_KEY=xyz", "OMP_NUM_THREADS=2"],
    }
    assert redact_settings(settings) == {
        "tracking": {"uri": "https://***@host:5000/a@b", "token": "***"},
        "detector": {"token_dim": 256, "keypoints": ["nose", "eye"], "class_token": True, "password": ""},
        "env": ["AWS_SECRET_ACCESS_KEY=***", "OMP_NUM_THREADS=2"],
    }


def test_a_file_uri_with_an_at_sign_stays():
    assert redact("sqlite:////data/run@home/mlflow.db") == "sqlite:////data/run@home/mlflow.db"

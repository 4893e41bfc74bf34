package runner

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
)

// environment is what every step sees: RAI's variables, so that course scripts keep
// working, and what makes live output live. An image may say more, and have its own
// paths and its own user. Nothing of the runner's own is in it.
func (r *Runner) environment(o job.Offer, b box.Box, mounts []box.Mount) []string {
	env := []string{
		"PATH=/usr/local/cuda/bin:/usr/local/nvidia/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:" + gpu.BoxTools,
		"LD_LIBRARY_PATH=/usr/local/cuda/lib64:/usr/local/nvidia/lib64:/usr/local/nvidia/lib:" + gpu.BoxLibraries,
		"HOME=/home/rai", "USER=rai", "LOGNAME=rai", "SHELL=/bin/bash", "TMPDIR=/tmp",
		"LANG=C.UTF-8", "TERM=xterm-256color",
		"PYTHONUNBUFFERED=1", // python holds output back from a pipe otherwise
	}
	if i, ok := b.(box.Imaged); ok {
		env = override(env, i.Image().Env...)
	}
	if slices.ContainsFunc(mounts, func(m box.Mount) bool { return m.Box == cacheInBox }) {
		env = override(env, "RAI_CACHE_DIR="+cacheInBox)
	}
	env = override(env,
		"CI=rai", "RAI=true", "RAI_ARCH=linux/"+runtime.GOARCH, "RAI_USER="+value(env, "USER"),
		"RAI_SOURCE_DIR=/src", "RAI_BUILD_DIR=/build", "RAI_DATA_DIR=/data",
		"SOURCE_DIR=/src", "BUILD_DIR=/build", "DATA_DIR=/data",
		fmt.Sprintf("RAI_JOB_ID=%d", o.Job), "IMAGE_NAME="+r.imageOf(o))
	return override(env, gpu.Environment(r.GPUs[:min(o.Spec.GPUs, len(r.GPUs))])...)
}

// override sets variables in env, adding those it lacks.
func override(env []string, set ...string) []string {
	for _, kv := range set {
		name, _, _ := strings.Cut(kv, "=")
		env = slices.DeleteFunc(env, func(old string) bool { return strings.HasPrefix(old, name+"=") })
		env = append(env, kv)
	}
	return env
}

func value(env []string, name string) string {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

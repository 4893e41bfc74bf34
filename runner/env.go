package runner

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/rai-project/raid/runner/job"
)

// environment is what every step sees: RAI's variables, so that course scripts keep
// working, and what makes live output live. Nothing of the runner's own is in it.
func (r *Runner) environment(o job.Offer) []string {
	env := []string{
		"CI=rai", "RAI=true", "RAI_ARCH=linux/" + runtime.GOARCH, "RAI_USER=rai",
		"RAI_SOURCE_DIR=/src", "RAI_BUILD_DIR=/build", "RAI_DATA_DIR=/data",
		"SOURCE_DIR=/src", "BUILD_DIR=/build", "DATA_DIR=/data",
		fmt.Sprintf("RAI_JOB_ID=%d", o.Job), "IMAGE_NAME=" + o.Spec.Image,
		"PATH=/usr/local/cuda/bin:/usr/local/nvidia/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"LD_LIBRARY_PATH=/usr/local/cuda/lib64:/usr/local/nvidia/lib64:/usr/local/nvidia/lib",
		"HOME=/home/rai", "USER=rai", "LOGNAME=rai", "SHELL=/bin/bash", "TMPDIR=/tmp",
		"LANG=C.UTF-8", "TERM=xterm-256color",
		"PYTHONUNBUFFERED=1", // python holds output back from a pipe otherwise
	}
	var ids []string
	for _, g := range r.GPUs[:min(o.Spec.GPUs, len(r.GPUs))] {
		ids = append(ids, g.UUID)
	}
	return append(env, "CUDA_VISIBLE_DEVICES="+strings.Join(ids, ","))
}

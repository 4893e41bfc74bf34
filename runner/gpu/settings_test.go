package gpu

import (
	"reflect"
	"testing"
)

func TestExamine(t *testing.T) {
	fake(t, "printf 'GPU-a, Enabled\\nGPU-b, Disabled\\n'\n")
	root := t.TempDir()
	s, err := examine(t.Context(), root)
	if want := (Settings{Sleepy: []string{"GPU-b"}, Driver: -1}); err != nil || !reflect.DeepEqual(s, want) {
		t.Errorf("examine = %+v, %v, want %+v", s, err, want)
	}
	write(t, root, map[string]string{"proc/driver/nvidia/params": "EnableMSI: 1\nRmProfilingAdminOnly: 0\n",
		"proc/driver/nvidia/gpus/0000:65:00.0/information": "", "dev/kmsg": ""})
	s, err = examine(t.Context(), root)
	if want := (Settings{Sleepy: []string{"GPU-b"}, Profiled: true, Log: true, Driver: 1}); err != nil || !reflect.DeepEqual(s, want) {
		t.Errorf("examine = %+v, %v, want %+v", s, err, want)
	}
}

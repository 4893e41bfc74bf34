package job

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestParseBuild(t *testing.T) {
	tests := []struct {
		name, in string
		want     Build
		notes    string // line:column text, joined by " | "
	}{
		{"empty", "", Build{}, "1:1 the file is empty"},
		{"comment", "# nothing\n", Build{}, "1:1 the file is empty"},
		{"full", `
rai:
  version: 0.2
  image: "a/b:c"
resources:
  cpu: {architecture: ppc64le}
  gpu:
    architecture: volta
    count: -2
    memory: 8GiB
  network: false
  limits:
    network: true
    time: 1h30m
    memory: 16GB
    datasize: 3
  cache: true
  tty: yes
commands:
  build_image:
    image_name: me/x
    dockerfile: ./Dockerfile
    nocache: on
    push:
      push: true
      image_name: me/y
      registry: r
      credentials: {username: u, password: '==AES32==x'}
  build: [make, "./a"]
`, Build{Version: "0.2", Image: "a/b:c", CPUArch: "ppc64le", GPU: &BuildGPU{-2, "volta", 8192}, Network: true,
			Time: 90 * time.Minute, Memory: 16e9, TTY: true, Cache: true, Steps: []string{"make", "./a"},
			BuildImage: &BuildImage{"me/x", "./Dockerfile", true, &BuildPush{true, "me/y", "r", "u", "==AES32==x"}}}, ""},
		{"version 0.10 stays", "rai: {version: 0.10}", Build{Version: "0.10"}, ""},
		{"gpu null", "resources:\n  gpu:\n", Build{}, ""},
		{"gpu ~", "resources: {gpu: ~}", Build{}, ""},
		{"gpu zero", "resources: {gpu: {count: 0}}", Build{GPU: &BuildGPU{}}, ""},
		{"gpu without count", "resources: {gpu: {architecture: pascal}}", Build{GPU: &BuildGPU{Count: 1, Arch: "pascal"}}, ""},
		{"seconds", "resources: {limits: {time: 90, memory: 1024}}", Build{Time: 90 * time.Second, Memory: 1024}, ""},
		{"network above", "resources:\n  network: true\n  limits: {network: false}\n", Build{Network: true}, ""},
		{"cache", "resources: {cache: yes}", Build{Cache: true}, ""},
		{"cache of another meaning", "resources:\n  cache: {size: 5}\n", Build{}, ""},
		{"cache of another word", "resources: {cache: 5GB}", Build{}, ""},
		{"tty at the top", "tty: true\n", Build{TTY: true}, ""},
		{"steps", "commands:\n  build:\n    - \"echo 'a: b'\" # c\n    -\n    - ''\n    - true\n    - |\n      x\n      y\n    - >-\n      long\n      line\n    - make && make test\n    - 'it''s'\n",
			Build{Steps: []string{"echo 'a: b'", "true", "x\ny\n", "long line", "make && make test", "it's"}}, ""},
		{"one step", "commands:\n  build: make all\n", Build{Steps: []string{"make all"}}, "2:10 build should be a list; taken as one command"},
		{"no steps", "commands:\n  build:\n", Build{}, ""},
		{"BOM and CRLF", "\ufeffcommands:\r\n  build:\r\n    - make\r\n", Build{Steps: []string{"make"}}, ""},
		{"blank lines and dashes with tabs", "rai:\t\n  version:\t0.2\t# x\n \t\ncommands:\n  build:\n    -\techo\ta\t\n\t\n    - |\n      x\n\t\n      \ty\n",
			Build{Version: "0.2", Steps: []string{"echo\ta", "x\n\n\ty\n"}}, ""},
		{"tabs in words", "commands:\n  build:\n    - gcc\t-o \"a\tb\" c \t # d\n    - a\tb\n      c\n\n      d\n    - 'x\ty'\n    - | # z\n      a\tb\n    - >\n      a\tb\n",
			Build{Steps: []string{"gcc\t-o \"a\tb\" c", "a\tb c\nd", "x\ty", "a\tb\n", "a\tb\n"}}, ""},
		{"lines that go on", "commands:\n  build:\n    - cmake \\\n        -DA=1 \\\n        -DB=2 /src\n    - 'a && \\\n      b'\n    - >\n      a \\\n      b\n    - |\n      a \\\n      b\n    - a\\ b\n",
			Build{Steps: []string{"cmake -DA=1 -DB=2 /src", "a && b", "a b\n", "a \\\nb\n", "a\\ b"}}, ""},
		{"names of machines", "resources: {cpu: {architecture: x86_64}}", Build{CPUArch: "amd64"}, ""},
		{"count 1.0", "resources: {gpu: {count: 1.0}}", Build{GPU: &BuildGPU{Count: 1}}, ""},
		{"commands for themselves", "commands:\n  build:\n    - cd out\n    - export A=1\n    - cd out && make\n    - export A=1; ./a\n",
			Build{Steps: []string{"cd out", "export A=1", "cd out && make", "export A=1; ./a"}},
			"3:7 this cd ends with its line: the next command begins in /build anew | 4:7 this export ends with its line: the next command begins in /build anew"},
		{"typo", "resources:\n  netwrok: false\n  zebra: 1\nimage: x\n", Build{},
			`2:3 unknown key "netwrok" (did you mean "network"?) | 3:3 unknown key "zebra" | 4:1 unknown key "image" here (it belongs in rai)`},
		{"terminal", "\"\\e[2J\": 1\n", Build{}, `1:1 unknown key "\x1b[2J"`},
		{"alias", "x: &img a:b\nrai: {image: *img}\n", Build{Image: "a:b"}, `1:1 unknown key "x"`},
		{"merge", "base: &b\n  image: a\n  version: 1\nrai:\n  <<: *b\n  image: c\n", Build{Image: "c", Version: "1"}, `1:1 unknown key "base"`},
		{"tagged", "rai: {version: !!str 3}", Build{Version: "3"}, ""},
		{"document marks", "---\nrai: {image: a}\n...\n", Build{Image: "a"}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, notes, err := ParseBuild([]byte(tt.in))
			if err != nil {
				t.Fatalf("ParseBuild = %v", err)
			}
			if !reflect.DeepEqual(*b, tt.want) {
				t.Errorf("ParseBuild = %+v, want %+v", *b, tt.want)
			}
			var got []string
			for _, n := range notes {
				got = append(got, fmt.Sprintf("%d:%d %s", n.Line, n.Column, n.Text))
			}
			if s := strings.Join(got, " | "); s != tt.notes {
				t.Errorf("notes = %s, want %s", s, tt.notes)
			}
		})
	}
}

func TestInnerShell(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{`/bin/bash -c "for f in a/*; do cp -v $f b/.; done"`, `/bin/bash -c 'for f in a/*; do cp -v $f b/.; done'`},
		{`bash -lc "ls | awk '{print $1}'" >out`, `bash -lc 'ls | awk '\''{print $1}'\''' >out`},
		{`sh -c "echo \"$X\" \$Y a\nb"`, `sh -c 'echo "$X" $Y a\nb'`},
		{"/bin/sh -c \"echo `date`\"", "/bin/sh -c 'echo `date`'"},
		{`/bin/bash -c "make && ./a"`, `/bin/bash -c "make && ./a"`}, // nothing to expand
		{`/bin/bash -c "a"$X"b"`, `/bin/bash -c "a"$X"b"`},           // no one word in quotes
		{`echo "$X"`, `echo "$X"`},
		{`zsh -c "$X"`, `zsh -c "$X"`},
	} {
		if got := innerShell(c.in); got != c.want {
			t.Errorf("innerShell(%s) = %s, want %s", c.in, got, c.want)
		}
	}
}

func TestParseBuildErrors(t *testing.T) {
	bomb := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'k'; c++ {
		bomb += fmt.Sprintf("%c: &%c [%s*%c]\n", c, c, strings.Repeat(fmt.Sprintf("*%c, ", c-1), 8), c-1)
	}
	tests := []struct{ name, in, want, hint string }{
		{"tab", "commands:\n\tbuild:\n", "2:1 tabs are not allowed for indentation; use spaces", "spaces"},
		{"tab in list", "commands:\n  build:\n  \t- make\n", "3:3 tabs are not", ""},
		{"tab later", "commands:\n  build:\n    - a\n\t- make\n", "4:1 tabs are not", ""},
		{"no-break space", "commands:\n  build:\n\u00a0 - make\n", "3:1 this is no ordinary space", "anew"},
		{"colon", "commands:\n  build:\n    - make\n    - echo a: b # c\n", `4:13 ": " makes a mapping`, `- 'echo a: b'`},
		{"colon at the end", "commands:\n  build:\n    - echo 'time':\n", `3:`, `- 'echo ''time'':'`},
		{"two colons", "commands:\n  build:\n    - echo a: b: c\n", `": "`, `- 'echo a: b: c'`},
		{"quoted colon", "commands:\n  build:\n    - echo \"a\": b: c\n", "3:", `- 'echo "a": b: c'`},
		{"value colon", "rai:\n  image: a: b\n", `2:11 ": " in a value`, `image: 'a: b'`},
		{"bracket", "commands:\n  build:\n    - [ -f a ] && b\n", "3:16 ", `- '[ -f a ] && b'`},
		{"whole bracket", "commands:\n  build:\n    - [ -f a ]\n", "3:7 this is a list", `- '[ -f a ]'`},
		{"quoted program", "commands:\n  build:\n    - \"a b\" c\n", "3:13 ", `- '"a b" c'`},
		{"star", "commands:\n  build:\n    - *.cu\n", "3:7 there is no anchor", `- '*.cu'`},
		{"not", "commands:\n  build:\n    - ! grep x y\n", `3:7 unknown tag "!"`, `- '! grep x y'`},
		{"at", "commands:\n  build:\n    - @x\n", "3:7 ", `- '@x'`},
		{"brace", "commands:\n  build:\n    - {a}\n", "3:", `- '{a}'`},
		{"open quote", "commands:\n  build:\n    - 'make\n", "3:7 ", ""},
		{"indentation", "commands:\n  build:\n    - make\n   - x\n", "4:4 ", "- 'x'"},
		{"duplicate", "rai:\n  image: a\n  image: b\n", `3:3 mapping key "image" already defined`, ""},
		{"list at the top", "- a\n", "1:1 the file has to be a mapping", "key: value"},
		{"text", "make\n", "1:1 the file has to be a mapping", "key: value"},
		{"rai is text", "rai: 0.2\n", "1:6 rai has to be a mapping", "key: value"},
		{"gpu is a number", "resources:\n  gpu: 1\n", "2:8 resources.gpu has to be a mapping", ""},
		{"count", "resources: {gpu: {count: two}}\n", `1:26 "two" is not a whole number`, ""},
		{"count too large", "resources: {gpu: {count: 99999999999}}\n", "is not a whole number", ""},
		{"bool", "resources: {network: maybe}\n", `1:22 "maybe" is neither true nor false`, "true"},
		{"time", "resources: {limits: {time: soon}}\n", `1:28 "soon" is not a time`, ""},
		{"negative time", "resources: {limits: {time: -5m}}\n", "is not a time", ""},
		{"endless time", "resources: {limits: {time: 1e300}}\n", "is not a time", ""},
		{"memory", "resources: {limits: {memory: -1}}\n", "is not a size", ""},
		{"image is a list", "rai: {image: [a]}\n", "this is a list, where a word belongs", ""},
		{"image with escape", "rai: {image: \"a\\e[2J\"}\n", `"a\x1b[2J" holds a control character`, ""},
		{"NUL in command", "commands: {build: [\"a\\0\"]}\n", "cannot hold a NUL", ""},
		{"control", "rai:\n  \x1b[2J: 1\n", `2:3 control character '\x1b'`, ""},
		{"UTF-16", "\xff\xfer\x00", "UTF-16", "UTF-8"},
		{"latin-1", "rai: {image: caf\xe9}\n", "1:17 this is not UTF-8", "UTF-8"},
		{"two documents", "rai: {image: a}\n---\nrai: {image: b}\n", "3:1 there is more than one document", ""},
		{"bomb", bomb + "commands:\n  build: *j\n", "", ""},
		{"endless alias", "a: &a\n  <<: *a\nrai: *a\n", "aliases", ""},
		{"deep", strings.Repeat("[", 60<<10), "deeply nested", ""},
		{"deep list", strings.Repeat("- ", 30<<10), "deeply nested", ""},
		{"many", strings.Repeat("- a\n", 15<<10), "too long", ""},
		{"large", strings.Repeat("# comment\n", 200<<10), "larger than", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			_, _, err := ParseBuild([]byte(tt.in))
			be, ok := errors.AsType[*BuildError](err)
			if !ok {
				t.Fatalf("ParseBuild = %v, want a *BuildError", err)
			}
			if got := fmt.Sprintf("%d:%d %s", be.Line, be.Column, be.Text); !strings.Contains(got, tt.want) {
				t.Errorf("ParseBuild = %s, want %s", got, tt.want)
			}
			if !strings.Contains(be.Hint, tt.hint) {
				t.Errorf("hint = %q, want %q", be.Hint, tt.hint)
			}
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("ParseBuild took %v", d)
			}
		})
	}
}

func TestBuildRender(t *testing.T) {
	_, notes, err := ParseBuild([]byte("resources:\n  # é\n  netwrok: false\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := "rai_build.yml:3:3: unknown key \"netwrok\" (did you mean \"network\"?)\n   3 |   netwrok: false\n     |   ^"
	if got := notes[0].Render(BuildFileName); got != want {
		t.Errorf("Render =\n%s\nwant\n%s", got, want)
	}
	_, _, err = ParseBuild([]byte("commands:\n  build:\n    - echo a: b\n"))
	want = "x.yml:3:13: \": \" makes a mapping of this command\n   3 |     - echo a: b\n     |             ^\nquote it:  - 'echo a: b'"
	be, ok := errors.AsType[*BuildError](err)
	if !ok || be.Render("x.yml") != want {
		t.Errorf("Render =\n%v\nwant\n%s", err, want)
	}
	long := BuildNote{Line: 1, Column: 5001, Text: "x", Source: strings.Repeat("a", 5000) + "\x1b" + strings.Repeat("b", 5000)}
	lines := strings.Split(long.Render("f"), "\n")
	if caret := strings.Index(lines[2], "^"); len([]rune(lines[1])) > 250 || string([]rune(lines[1])[caret:caret+4]) != `\x1b` {
		t.Errorf("Render of a long line =\n%s", long.Render("f"))
	}
}

func TestBuildTemplate(t *testing.T) {
	b, notes, err := ParseBuild([]byte(BuildTemplate))
	if err != nil || len(notes) > 0 || len(b.Steps) != 3 || b.GPU == nil || b.Time != 10*time.Minute {
		t.Errorf("ParseBuild(BuildTemplate) = %+v, %v, %v", b, notes, err)
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "9007199254740993": 9007199254740993, "8GB": 8e9, "8GiB": 8 << 30, "8g": 8 << 30,
		"1.5 MiB": 3 << 19, "10kb": 10000, "7B": 7, "2T": 2 << 40} {
		if got, err := ParseSize(in); got != want || err != nil {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "x", "-1", "8XB", "GB", "1e30", "NaN", "8 9GB", "inf"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", in, got)
		}
	}
}

// cases finds the build files of real courses, where a checkout has them.
func cases(t testing.TB) []string {
	t.Helper()
	dir := os.Getenv("RAID_CASES")
	if dir == "" {
		dir = "../../../shared/cases"
	}
	files, err := filepath.Glob(filepath.Join(dir, "*rai_build.yml"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestRealBuildFiles(t *testing.T) {
	files := cases(t)
	if len(files) == 0 {
		t.Skip("no real build files: set RAID_CASES to a folder with some")
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		b, notes, err := ParseBuild(text)
		if err != nil || len(notes) > 0 || b.Image == "" || b.GPU == nil || b.GPU.Count != 1 || len(b.Steps) < 4 || b.Network {
			t.Errorf("ParseBuild(%s) = %+v, %v, %v", filepath.Base(file), b, notes, err)
		}
	}
}

func FuzzParseBuild(f *testing.F) {
	for _, file := range cases(f) {
		if text, err := os.ReadFile(file); err == nil {
			f.Add(text)
		}
	}
	for _, s := range []string{BuildTemplate, "a: &a [*a]\n<<: *a\n", "commands:\n  build:\n\t- a: b\n", "rai: !!str {a: b}", "? [a]\n: b\n", "%YAML 1.2\n---\na"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		b, notes, err := ParseBuild(in)
		text := strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(strings.TrimPrefix(string(in), "\ufeff"))
		lines := strings.Split(text, "\n")
		if be, ok := errors.AsType[*BuildError](err); ok {
			notes = append(notes, be.BuildNote)
			be.Render("x")
		} else if err != nil || b == nil {
			t.Fatalf("ParseBuild(%q) = %v, %v, want a *BuildError", in, b, err)
		}
		for _, n := range notes {
			if n.Line < 1 || n.Line > len(lines) || n.Column < 1 || n.Column > utf8.RuneCountInString(lines[n.Line-1])+1 {
				t.Errorf("ParseBuild(%q): %d:%d %s lies outside the text", in, n.Line, n.Column, n.Text)
			}
			if s := n.Render("x"); strings.ContainsFunc(strings.ReplaceAll(s, "\n", ""), func(r rune) bool { return r < ' ' || r == 0x7f }) {
				t.Errorf("ParseBuild(%q): Render = %q holds control characters", in, s)
			}
		}
	})
}

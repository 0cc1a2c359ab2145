module thaw.dev/sample/router

go 1.22
